"""Public sets as triples, on hand-made rows of each schema; prompts of an evaluation that may not be trained on."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from derta_jax.cli import main
from derta_jax.data.dataset import load_dataset
from derta_jax.data.examples import AuthorsRow, Helpful, Triple
from derta_jax.data.gather import gather
from derta_jax.data.public_sets import SETS, read_public_set
from derta_jax.data.refused_prompts import prompt_hash, prompt_of
from derta_jax.errors import UserError


def pku(prompt: str, first: str, first_safe: bool, second: str, second_safe: bool) -> dict[str, Any]:
    """With the columns of the real file that are not read, too."""
    return {
        "prompt": prompt,
        "response_0": first,
        "response_1": second,
        "prompt_source": "glorp",
        "is_response_0_safe": first_safe,
        "is_response_1_safe": second_safe,
        "response_0_harm_category": {"Endangering Zibs": not first_safe, "Privacy": False},
        "response_1_harm_category": {"Endangering Zibs": False, "Privacy": not second_safe},
        "better_response_id": 0,
        "safer_response_id": 0,
    }


def beaver(prompt: str, response: str, safe: bool) -> dict[str, Any]:
    return {"prompt": prompt, "response": response, "category": {"zibs": not safe, "zabs": False}, "is_safe": safe}


ROWS = {
    "pku-saferlhf": [
        pku("Make a glorp?", "No glorp from me.", True, "A zib and a zab.", False),
        pku("Make a florp?", "Two zibs.", False, "No florp from me.", True),
        pku("Make a tea?", "Water and leaves.", True, "Leaves and water.", True),
    ],
    "beavertails": [
        beaver("Make a glorp?", "A zib and a zab.", False),
        beaver("Make a glorp?", "No glorp from me.", True),
        beaver("Make a glorp?", "A zab, then a zib.", False),
        beaver("Make a florp?", "No florp from me.", True),
        beaver("Make a florp?", "No florp from me.", True),
        beaver("Make a florp?", "Two zibs.", False),
    ],
    "circuit-breakers": [
        {
            "category": "zibs",
            "prompt": "Make a glorp?",
            "output": "A zib and a zab.",
            "llama3_output": "No glorp from me.",
        },
        {"category": "", "prompt": "Make a florp?", "output": "Two zibs.", "llama3_output": "No florp from me."},
        {"category": "", "prompt": "Make a norp?", "output": " ", "llama3_output": "No norp from me."},
    ],
    "lat": [
        {"prompt": "Make a glorp?", "chosen": "No glorp from me.", "rejected": "A zib and a zab."},
        {"prompt": "Make a florp? ", "chosen": "No florp from me.\n", "rejected": "Two zibs."},
    ],
}

LEFT_OUT = {
    "pku-saferlhf": {"safe answers without a counterpart": 2},
    "beavertails": {"the same answer to the same prompt again": 1, "harmful answers without a counterpart": 1},
    "circuit-breakers": {"an empty prompt or answer": 1, "safe answers without a counterpart": 1},
    "lat": {},
}


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


@pytest.mark.parametrize("name", SETS)
def test_a_safe_answer_beside_a_harmful_one_to_the_same_prompt(name: str, tmp_path: Path) -> None:
    found = read_public_set(name, [write(tmp_path / "rows.jsonl", ROWS[name])])
    triples = [example for example in found.examples if isinstance(example, Triple)]
    assert [(triple.prompt, triple.safe, triple.harmful) for triple in triples] == [
        ("Make a glorp?", "No glorp from me.", "A zib and a zab."),
        ("Make a florp?", "No florp from me.", "Two zibs."),
    ]
    assert found.left_out == LEFT_OUT[name]
    assert all(triple.source == name and triple.id.startswith(name) for triple in triples)


def test_the_kind_of_harm_is_kept(tmp_path: Path) -> None:
    categories = {
        name: [example.category for example in read_public_set(name, [write(tmp_path / name, rows)]).examples]  # type: ignore[union-attr]
        for name, rows in ROWS.items()
    }
    assert categories == {
        "pku-saferlhf": ["Privacy", "Endangering Zibs"],
        "beavertails": ["zibs", "zibs"],
        "circuit-breakers": ["zibs", ""],
        "lat": ["", ""],
    }


def test_an_array_and_a_gzipped_file_are_read_as_lines_are(tmp_path: Path) -> None:
    lines = read_public_set("lat", [write(tmp_path / "rows.jsonl", ROWS["lat"])]).examples
    array = tmp_path / "rows.json"
    array.write_text(json.dumps(ROWS["lat"], indent=2))
    zipped = tmp_path / "rows.jsonl.gz"
    zipped.write_bytes(gzip.compress((tmp_path / "rows.jsonl").read_bytes()))
    assert read_public_set("lat", [array]).examples == lines
    assert read_public_set("lat", [zipped]).examples == lines


def test_a_limit_chooses_the_same_on_any_machine_and_in_any_order(tmp_path: Path) -> None:
    rows = [{"prompt": f"Make {i}?", "chosen": "No.", "rejected": f"Take {i}."} for i in range(50)]
    forwards = read_public_set("lat", [write(tmp_path / "a", rows)], limit=7)
    backwards = read_public_set("lat", [write(tmp_path / "b", rows[::-1])], limit=7)
    assert len(forwards.examples) == 7
    assert {example.id for example in forwards.examples} == {example.id for example in backwards.examples}
    assert forwards.left_out == {"more than 7 triples (--limit)": 43}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"prompt": "p", "chosen": "c"}', "rows:1: rejected: missing"),
        ('{"prompt": "p", "chosen": "c", "rejeced": "r"}', "rows:1: rejected: missing; did you mean 'rejeced'?"),
        ('{"prompt": "p", "chosen": 3, "rejected": "r"}', "rows:1: chosen: must be a string"),
        ('\n{"prompt": "p"', "rows:2: not valid JSON at column"),
        ('[{"prompt": "p"]', "rows:1: not valid JSON at column"),
        ("[3]", "rows[0]: must be a JSON object"),
        ('{"prompt": "p", "chosen": "", "rejected": "r"}', "no prompt has both a safe and a harmful answer"),
    ],
)
def test_bad_records_are_named(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "rows").write_text(text)
    with pytest.raises(UserError) as caught:
        read_public_set("lat", [tmp_path / "rows"])
    assert message in str(caught.value)


@pytest.mark.parametrize(("name", "content"), [("rows.parquet", b"PAR1"), ("rows.gz", b"not gzip"), ("rows", b"\xff")])
def test_files_that_are_something_else(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match="rows"):
        read_public_set("lat", [tmp_path / name])


def test_a_limit_below_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--limit 0: at least 1"):
        read_public_set("lat", [tmp_path], limit=0)


@pytest.fixture
def lat(tmp_path: Path) -> Path:
    return write(tmp_path / "lat.jsonl", ROWS["lat"])


@pytest.mark.parametrize(
    "line",
    ["MAKE a glorp", prompt_hash("Make a glorp?"), '{"question": "make a glorp!"}', '{"Goal": " Make  a glorp "}'],
)
def test_prompts_of_an_evaluation_are_refused_or_left_out(line: str, lat: Path, tmp_path: Path) -> None:
    refused = tmp_path / "evaluation.txt"
    refused.write_text(f"# of our evaluation\n\n{line}\n")
    with pytest.raises(UserError, match=r"1 examples ask what the evaluation asks: lat-\w{16}\n--leave-out"):
        gather([lat], source="lat", refuse=[refused])
    dataset, left_out = gather([lat], source="lat", leave_out=[refused])
    assert [prompt_of(example) for example in dataset.examples] == ["Make a florp?"]
    assert left_out == {"prompts of --leave-out": 1}


def test_the_prompt_of_every_kind_of_example() -> None:
    assert prompt_of(AuthorsRow("a", "[INST] Make a glorp? [\\INST] A zib", " Sorry", rto=True)) == "Make a glorp?"
    assert prompt_of(Helpful("h", "Make a tea?", "Water.")) == "Make a tea?"


@pytest.mark.parametrize(
    ("text", "message"), [("{", "list:1: not valid JSON"), ('{"p": "q"}', "list:1: has none of prompt")]
)
def test_lists_that_are_none(text: str, message: str, lat: Path, tmp_path: Path) -> None:
    (tmp_path / "list").write_text(text)
    with pytest.raises(UserError, match=message):
        gather([lat], source="lat", refuse=[tmp_path / "list"])
    with pytest.raises(UserError, match="no list of prompts"):
        gather([lat], source="lat", refuse=[tmp_path / "absent"])


def test_a_public_set_and_our_own_rows_in_one_dataset(lat: Path, tmp_path: Path, capsys: Any) -> None:
    ours = write(tmp_path / "helpful.jsonl", [{"id": "h1", "prompt": "Make a tea?", "response": "Water and leaves."}])
    words = ["--from", "lat", "--with", str(ours), "--limit", "1", "--output", str(tmp_path / "data")]
    assert main(["prepare", str(lat), *words]) == 0
    out = capsys.readouterr().out
    assert "left out: 1 × more than 1 triples (--limit)" in out
    assert "2 examples (1 triple, 1 helpful)" in out
    assert [type(example) for example in load_dataset(tmp_path / "data").examples] == [Triple, Helpful]


def test_an_id_that_a_public_set_and_our_own_rows_share_is_refused(lat: Path, tmp_path: Path) -> None:
    (first, *_) = read_public_set("lat", [lat]).examples
    ours = write(tmp_path / "helpful.jsonl", [{"id": first.id, "prompt": "Make a tea?", "response": "Water."}])
    with pytest.raises(UserError, match=f"ids are used more than once: {first.id}"):
        gather([lat], [ours], source="lat")


def test_the_authors_own_files(shared_data: Path) -> None:
    found = read_public_set("derta", [shared_data / "derta_example_rows.jsonl"])
    assert len(found.examples) == 4
    assert not found.left_out
    assert prompt_of(found.examples[0]).startswith("Suggest a suitable card game")
