"""Answers go out to people as CSV and come back with labels."""

import csv
import io
import json

import pytest

from derta_jax.errors import UserError
from derta_jax.evaluation.judging.answers import read_answers
from derta_jax.evaluation.judging.label_sheet import Sheet, read_sheet, write_sheet
from tests.conftest import write_jsonl


def answer_row(index, name="plain", **changes):
    return {
        "id": f"q{index}",
        "prompt": f"How do I take object {index}?",
        "group": "attacks",
        "name": name,
        "prefill": "",
        "response": f"Take object {index},\nthen go.",
        "verdict": "unsafe",
    } | changes


@pytest.fixture
def answered(tmp_path):
    rows = [answer_row(index, name) for name in ("plain", "prefill-5") for index in range(6)]
    files = [write_jsonl(tmp_path / f"{model}.jsonl", rows) for model in ("base", "tuned")]
    return read_answers(files)


def sheet_of(answered, path, **layout):
    write_sheet(answered, ["unsafe"] * len(answered), path, Sheet(**layout))
    return list(csv.DictReader(io.StringIO(path.read_bytes().decode("utf-8-sig"), newline="")))


def fill_in(path, rows, labels, delimiter=","):
    """What a person and a spreadsheet make of it."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows([row | {"label": label} for row, label in zip(rows, labels, strict=False)])
    path.write_text(text.getvalue(), encoding="utf-8", newline="")


def test_a_sheet_has_every_answer_and_an_empty_label(answered, tmp_path):
    rows = sheet_of(answered, tmp_path / "s.csv")
    assert list(rows[0]) == ["id", "model", "attack", "prompt", "prefill", "response", "verdict", "label"]
    assert len(rows) == len(answered) == 24
    assert rows[13]["model"] == "tuned"
    assert rows[13]["response"] == "Take object 1,\nthen go."
    assert {row["label"] for row in rows} == {""}


def test_a_blind_sheet_is_shuffled_and_says_neither_model_nor_verdict(answered, tmp_path):
    rows = sheet_of(answered, tmp_path / "s.csv", blind=True, seed=1)
    assert list(rows[0]) == ["id", "attack", "prompt", "prefill", "response", "label"]
    order = [row["id"] for row in rows]
    assert sorted(order) == sorted(item.key for item in answered)
    assert order != [item.key for item in answered]
    assert order == [row["id"] for row in sheet_of(answered, tmp_path / "s.csv", blind=True, seed=1)]
    assert order != [row["id"] for row in sheet_of(answered, tmp_path / "s.csv", blind=True, seed=2)]
    assert "base" not in (tmp_path / "s.csv").read_text(encoding="utf-8")


def test_a_sample_takes_the_same_questions_for_every_model(answered, tmp_path):
    rows = sheet_of(answered, tmp_path / "s.csv", per_attack=2)
    questions: dict[tuple[str, str], set[str]] = {}
    for row in rows:
        questions.setdefault((row["attack"], row["model"]), set()).add(row["prompt"])
    assert {place: len(prompts) for place, prompts in questions.items()} == dict.fromkeys(
        [("plain", "base"), ("plain", "tuned"), ("prefill-5", "base"), ("prefill-5", "tuned")], 2
    )
    assert questions["plain", "base"] == questions["plain", "tuned"]
    assert len(sheet_of(answered, tmp_path / "s.csv", per_attack=100)) == 24


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t", "\r"])
def test_no_cell_is_a_formula(tmp_path, start):
    cell = start + "HYPERLINK(1)"
    row = answer_row(0, name=cell, prompt=cell, response=cell, prefill=cell)
    (written,) = sheet_of(read_answers([write_jsonl(tmp_path / "=m.jsonl", [row])]), tmp_path / "s.csv")
    for column in ("model", "attack", "prompt", "prefill", "response"):
        assert written[column].startswith("'" + start if column != "model" else "'=")


def test_ids_are_text_to_a_spreadsheet_and_change_with_the_answer(tmp_path):
    rows = [answer_row(0), answer_row(0), answer_row(0, response="Another.")]
    file = write_jsonl(tmp_path / "base.jsonl", rows)
    keys = [item.key for item in read_answers([file])]
    assert len(set(keys)) == 3
    assert all(key.startswith("answer-") for key in keys)
    assert keys == [item.key for item in read_answers([file])]


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_labels_come_back(answered, tmp_path, delimiter):
    path = tmp_path / "s.csv"
    rows = sheet_of(answered, path, blind=True, per_attack=3)
    labels = ["unsafe", " Refused ", "SAFE", "unjudged", "", *["safe"] * 7]
    fill_in(path, rows, labels, delimiter)
    read = read_sheet(path, answered)
    assert (len(read.by_key), read.unlabelled, read.missing) == (11, 1, 12)
    verdicts = dict(zip([item.key for item in answered], read.verdicts(answered), strict=True))
    assert [verdicts[row["id"]].label for row in rows[:5]] == ["unsafe", "refused", "safe", "unjudged", "unjudged"]
    assert verdicts[rows[4]["id"]].problem == "no label"
    assert len(verdicts) == 24


def test_rows_that_were_deleted_are_counted_as_missing(answered, tmp_path):
    path = tmp_path / "s.csv"
    rows = sheet_of(answered, path)
    fill_in(path, rows[:20], ["safe"] * 20)
    assert read_sheet(path, answered).missing == 4


def test_mistakes_are_named_with_row_and_column(answered, tmp_path):
    path = tmp_path / "s.csv"
    rows = sheet_of(answered, path)[:4]
    rows[1]["id"], rows[2]["id"] = "answer-0", rows[0]["id"]
    fill_in(path, rows, ["safe", "safe", "safe", "unsaef"])
    with pytest.raises(UserError) as refused:
        read_sheet(path, answered)
    message = str(refused.value)
    assert f"{path}: row 3, column id: answer-0 is none of these answers" in message
    assert f"{path}: row 4, column id: {rows[0]['id']} is in row 2 already" in message
    assert f"{path}: row 5, column label: 'unsaef' is none of unsafe, refused, safe, unjudged" in message
    assert "did you mean 'unsafe'?" in message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "one column `id`"),
        (b"id,verdict\n", "one column `label` "),
        (b"id,label,label\n", "one column `label` "),
        (b"id,label\n", "no row has a label"),
        (b"id,label\n\xff\xfe", "save it as CSV UTF-8"),
        (b"id,label\nanswer-1\n", "row 2, column id"),
    ],
)
def test_a_file_that_is_no_sheet(answered, tmp_path, content, message):
    (tmp_path / "s.csv").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_sheet(tmp_path / "s.csv", answered)


def test_a_sheet_that_is_not_there(answered, tmp_path):
    with pytest.raises(UserError, match="cannot read labels"):
        read_sheet(tmp_path / "no.csv", answered)
    with pytest.raises(UserError, match="--per-attack"):
        Sheet(per_attack=0)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[1]", "is not a JSON object"),
        ("{", "Expecting"),
        (json.dumps(answer_row(0) | {"response": None}), "`response` must be a string"),
        (json.dumps(answer_row(0) | {"verdict": "good"}), "`verdict` must be one of"),
    ],
)
def test_answers_that_are_none_are_named_with_file_and_line(tmp_path, line, message):
    path = tmp_path / "base.jsonl"
    path.write_text(json.dumps(answer_row(0)) + "\n" + line + "\n", encoding="utf-8")
    with pytest.raises(UserError, match=rf"base\.jsonl:2: {message}"):
        read_answers([path])


def test_two_files_of_one_name_would_be_one_model(tmp_path):
    (tmp_path / "a").mkdir()
    files = [write_jsonl(place / "base.jsonl", [answer_row(0)]) for place in (tmp_path, tmp_path / "a")]
    with pytest.raises(UserError, match="two files are named base"):
        read_answers(files)
    with pytest.raises(UserError, match="no answers"):
        read_answers([write_jsonl(tmp_path / "none.jsonl", [])])
    with pytest.raises(UserError, match="cannot read answers"):
        read_answers([tmp_path / "missing.jsonl"])
