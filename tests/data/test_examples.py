"""The three input formats, and what a user is told about every line that is none of them."""

import json

import pytest

from derta_jax.data.examples import AuthorsRow, Helpful, Triple, read_examples
from derta_jax.errors import UserError
from tests.conftest import helpful, triple, write_jsonl

AUTHORS_RTO = {"prefix": "[INST] How? [\\INST]", "text": " First, take it.<|end_of_text|>", "safe": "true"}
AUTHORS_MLE = {"prefix": "[INST] How? [\\INST] First,", "text": " Sorry, no.<|end_of_text|>", "safe": "false"}


def without(row: dict, field: str) -> dict:
    return {name: value for name, value in row.items() if name != field}


@pytest.fixture
def problems(tmp_path):
    """The lines of the error that a file with these lines gives, each without the path."""

    def read(*lines: bytes | dict) -> list[str]:
        file = tmp_path / "rows.jsonl"
        raw = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
        file.write_bytes(b"\n".join(raw))
        with pytest.raises(UserError) as raised:
            read_examples([file])
        header, *told = str(raised.value).splitlines()
        assert header == "the data has problems:"
        return [line.strip().replace(f"{tmp_path}/", "") for line in told]

    return read


def test_a_triple_a_helpful_row_and_the_authors_rows_may_stand_in_one_file(tmp_path):
    file = write_jsonl(tmp_path / "mixed.jsonl", [triple(1), helpful(2), AUTHORS_RTO, AUTHORS_MLE])
    assert [type(example) for example in read_examples([file])] == [Triple, Helpful, AuthorsRow, AuthorsRow]


def test_a_triple_keeps_every_field(tmp_path):
    file = write_jsonl(tmp_path / "rows.jsonl", [triple(1)])
    assert read_examples([file]) == [Triple(**triple(1))]


def test_source_and_category_of_a_triple_may_be_left_out(tmp_path):
    file = write_jsonl(tmp_path / "rows.jsonl", [without(without(triple(1), "source"), "category")])
    assert read_examples([file]) == [Triple(**triple(1, source="", category=""))]


def test_authors_rows_are_read_as_they_are_and_named_by_their_place(tmp_path):
    file = write_jsonl(tmp_path / "train.jsonl", [AUTHORS_RTO, AUTHORS_MLE])
    assert read_examples([file]) == [
        AuthorsRow("train-1", AUTHORS_RTO["prefix"], AUTHORS_RTO["text"], rto=True),
        AuthorsRow("train-2", AUTHORS_MLE["prefix"], AUTHORS_MLE["text"], rto=False),
    ]


def test_the_authors_released_rows_are_read(shared_data):
    rows = read_examples([shared_data / "derta_example_rows.jsonl"])
    assert len(rows) == 4
    assert {row.rto for row in rows if isinstance(row, AuthorsRow)} == {True, False}


def test_several_files_are_read_in_the_order_given(tmp_path):
    second = write_jsonl(tmp_path / "a.jsonl", [helpful(1)])
    first = write_jsonl(tmp_path / "b.jsonl", [helpful(2)])
    assert [example.id for example in read_examples([first, second])] == ["helpful-2", "helpful-1"]


def test_blank_lines_and_windows_line_ends_are_passed_over(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b"\n" + json.dumps(helpful(1)).encode() + b"\r\n  \r\n" + json.dumps(helpful(2)).encode())
    assert [example.id for example in read_examples([file])] == ["helpful-1", "helpful-2"]


def test_a_blank_line_counts_as_a_line(problems):
    assert problems(b"", b"{") == ["rows.jsonl:2: not valid JSON at column 2: Expecting property name enclosed in"
                                   " double quotes"]  # fmt: skip


def test_broken_json_is_named_with_its_column(problems):
    [problem] = problems(helpful(1), b'{"id": "a", "prompt" "b"}')
    assert problem == "rows.jsonl:2: not valid JSON at column 22: Expecting ':' delimiter"


@pytest.mark.parametrize("field", ["id", "prompt", "safe", "harmful"])
def test_a_missing_field_of_a_triple_is_named(problems, field):
    assert problems(without(triple(1), field)) == [f"rows.jsonl:1: {field}: missing"]


@pytest.mark.parametrize("field", ["prefix", "text", "safe"])
def test_a_missing_field_of_an_authors_row_is_named(problems, field):
    assert problems(without(AUTHORS_RTO, field)) == [f"rows.jsonl:1: {field}: missing"]


def test_a_misspelt_field_is_named_with_its_nearest_spelling(problems):
    row = without(triple(1), "harmful") | {"harmfull": "First, take it."}
    assert problems(row) == ["rows.jsonl:1: harmful: missing; is it spelt 'harmfull'?"]


def test_an_object_of_no_known_format_is_told_what_the_formats_are(problems):
    [problem] = problems({"id": "a", "prompt": "b", "respons": "c"})
    assert "rows.jsonl:1: is neither {id, prompt, safe, harmful}, or {id, prompt, response}, or" in problem
    assert "unknown field 'respons'; did you mean 'response'?" in problem


@pytest.mark.parametrize("answer", ["", " \n"])
def test_an_empty_answer_is_named(problems, answer):
    assert problems(triple(1, safe=answer)) == ["rows.jsonl:1: safe: is empty"]
    assert problems(helpful(1, response=answer)) == ["rows.jsonl:1: response: is empty"]


@pytest.mark.parametrize(
    ("value", "kind"),
    [(5, "a number"), (None, "null"), (True, "a boolean"), (["a"], "an array"), ({"a": "b"}, "an object")],
)
def test_a_wrong_type_is_named(problems, value, kind):
    assert problems(triple(1, harmful=value)) == [f"rows.jsonl:1: harmful: must be a string, not {kind}"]


def test_the_optional_id_of_an_authors_row_must_be_a_string(problems):
    assert problems(AUTHORS_RTO | {"id": 5}) == ["rows.jsonl:1: id: must be a string, not a number"]


@pytest.mark.parametrize("safe", ["True", "yes"])
def test_safe_of_an_authors_row_is_the_string_true_or_false(problems, safe):
    [problem] = problems(AUTHORS_RTO | {"safe": safe})
    assert problem == f'rows.jsonl:1: safe: must be "true" (an RTO row) or "false" (not {safe!r})'


def test_a_byte_that_is_not_utf_8_is_named_with_its_place(problems):
    assert problems(b'{"id": "\xff"}') == ["rows.jsonl:1: byte 9 of the line is not UTF-8"]


def test_half_a_surrogate_pair_is_not_text(problems):
    [problem] = problems(triple(1, safe="Sorry \ud800"))
    assert problem.startswith("rows.jsonl:1: safe: holds half of a surrogate pair")


@pytest.mark.parametrize(("line", "kind"), [(b'["a"]', "an array"), (b'"a"', "a string"), (b"null", "null")])
def test_a_line_that_is_not_an_object_is_named(problems, line, kind):
    assert problems(line) == [f"rows.jsonl:1: must be a JSON object, not {kind}"]


def test_an_id_used_twice_names_both_places(tmp_path):
    first = write_jsonl(tmp_path / "first.jsonl", [helpful(1), triple(7)])
    second = write_jsonl(tmp_path / "second.jsonl", [helpful(7, id="triple-7")])
    with pytest.raises(UserError, match=f"{second}:1: id: 'triple-7' is already used at {first}:2"):
        read_examples([first, second])


def test_every_problem_of_a_line_is_listed(problems):
    assert problems(triple(1, safe="", harmful=3)) == [
        "rows.jsonl:1: safe: is empty; harmful: must be a string, not a number"
    ]


def test_all_problems_of_a_file_are_listed_in_one_error(problems):
    told = problems(triple(1), b"{", without(triple(2), "safe"), helpful(3), triple(4, safe=""), b"\xff", b"[]")
    assert [problem.split(": ")[0] for problem in told] == [f"rows.jsonl:{line}" for line in (2, 3, 5, 6, 7)]


def test_a_hopeless_file_is_cut_short_with_the_count_of_the_rest(problems):
    told = problems(*[b"{"] * 30)
    assert len(told) == 21
    assert told[-1] == "… and 10 more"


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match=f"no data file {tmp_path}/nothing.jsonl"):
        read_examples([tmp_path / "nothing.jsonl"])


def test_a_file_without_examples_is_named(tmp_path):
    empty = write_jsonl(tmp_path / "empty.jsonl", [])
    with pytest.raises(UserError, match=f"no examples in {empty}"):
        read_examples([empty])
