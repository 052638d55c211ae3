"""Which files of prompts are read, what becomes of them, and what is said of those that cannot be."""

import codecs
import json

import pytest

from derta_jax.errors import UserError
from derta_jax.evaluation.questions import fill, read_questions
from tests.conftest import write_jsonl

HARMBENCH = """\
Behavior,FunctionalCategory,SemanticCategory,Tags,ContextString,BehaviorID
Explain how a florp is made,standard,florps,,,make_florp
"Answer the question, in full",contextual,grells,context,"Grells are found
under stones.",find_grells
"""
JAILBREAKBENCH = """\
Index,Goal,Target,Behavior,Category,Source
0,Explain how a florp is made,"Sure, here is how",Florps,Making,Original
"""
STRONGREJECT = "category,source,forbidden_prompt\nMaking,custom,How is a florp made?\n"
XSTEST = """\
id,prompt,type,label,focus,note
1,How can I stir soup?,homonyms,safe,stir,cooking
2,How can I stir a grell?,contrast_homonyms,unsafe,stir,
"""
OR_BENCH = "prompt,category\nHow do grells hum?,grells\n"


@pytest.fixture
def write(tmp_path):
    def file(name, content):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return file


@pytest.fixture
def refused(write):
    """The lines of the error that a file gives, without its path."""

    def told(name, content):
        path = write(name, content)
        with pytest.raises(UserError) as raised:
            read_questions(path)
        return [line.strip().removeprefix(f"{path}:").strip() for line in str(raised.value).splitlines()]

    return told


@pytest.mark.parametrize("key", ["prompt", "question", "instruction"])
def test_jsonl_keeps_its_fields_and_names_rows_after_their_lines(tmp_path, key):
    path = write_jsonl(tmp_path / "kites.jsonl", [{key: "How?", "category": "kites"}, {"id": 7, key: "Why?"}])
    assert read_questions(path) == [
        {"id": "kites-1", key: "How?", "category": "kites", "prompt": "How?"},
        {"id": 7, key: "Why?", "prompt": "Why?"},
    ]


def test_prompt_goes_before_question(tmp_path):
    (question,) = read_questions(write_jsonl(tmp_path / "a.jsonl", [{"question": "no", "prompt": "yes"}]))
    assert (question["prompt"], question["question"]) == ("yes", "no")


def test_a_json_file_may_hold_lines_or_one_list(write):
    rows = [{"instruction": "How?", "dataset": "kites"}, {"instruction": "Why?\u2028"}]
    lines = read_questions(write("lines.json", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)))
    whole = read_questions(write("whole.json", json.dumps(rows, indent=2)))
    single = read_questions(write("single.json", json.dumps(rows)))
    assert [question["prompt"] for question in lines] == ["How?", "Why?\u2028"]
    assert [question["id"] for question in whole] == ["whole-1", "whole-2"]
    assert [question["dataset"] for question in single[:1]] == ["kites"]
    (one,) = read_questions(write("one.json", json.dumps(rows[0], indent=2)))
    assert one["prompt"] == "How?"


@pytest.mark.parametrize("indent", [None, 4])
def test_harmbench_test_cases_are_prompts_that_know_their_behaviour(write, indent):
    cases = {"make_florp": ["How?", "And how else?"], "find_grells": ["Where?"]}
    questions = read_questions(write("test_cases.json", json.dumps(cases, indent=indent)))
    assert [(question["id"], question["behavior"], question["prompt"]) for question in questions] == [
        ("make_florp/1", "make_florp", "How?"),
        ("make_florp/2", "make_florp", "And how else?"),
        ("find_grells", "find_grells", "Where?"),
    ]


def test_easyjailbreak_instances_have_their_query_put_in(tmp_path):
    rows = [{"jailbreak_prompt": "Tell me: {query}", "query": "How?", "target_responses": [], "eval_results": []}]
    (question,) = read_questions(write_jsonl(tmp_path / "pair.jsonl", rows))
    assert (question["prompt"], question["query"]) == ("Tell me: How?", "How?")


def test_harmbench_behaviours_have_their_context_before_them(write):
    plain, contextual = read_questions(write("harmbench.csv", HARMBENCH))
    assert plain == {
        "id": "make_florp",
        "prompt": "Explain how a florp is made",
        "category": "florps",
        "functional_category": "standard",
    }
    assert contextual["prompt"] == "Grells are found\nunder stones.\n\n---\n\nAnswer the question, in full"
    assert contextual["query"] == "Answer the question, in full"


def test_the_other_benchmarks_are_known_by_their_columns(write):
    assert read_questions(write("jbb.csv", JAILBREAKBENCH)) == [
        {
            "id": "Florps",
            "prompt": "Explain how a florp is made",
            "category": "Making",
            "target": "Sure, here is how",
            "source": "Original",
        }
    ]
    assert read_questions(write("strong.csv", STRONGREJECT)) == [
        {"id": "strong-2", "prompt": "How is a florp made?", "category": "Making", "source": "custom"}
    ]
    assert read_questions(write("or.csv", OR_BENCH)) == [
        {"id": "or-2", "prompt": "How do grells hum?", "category": "grells"}
    ]


@pytest.mark.parametrize("labelled", [True, False])
def test_xstest_says_which_prompts_should_be_answered(write, labelled):
    unlabelled = "id,prompt,type\n1,How can I stir soup?,homonyms\n2,How can I stir a grell?,contrast_homonyms\n"
    questions = read_questions(write("xstest.csv", XSTEST if labelled else unlabelled))
    assert [(question["id"], question["category"], question["label"]) for question in questions] == [
        ("1", "homonyms", "safe"),
        ("2", "contrast_homonyms", "unsafe"),
    ]


@pytest.mark.parametrize("name", ["or.csv", "lines.jsonl", "lines.json"])
def test_a_byte_order_mark_and_windows_line_ends_are_passed_over(write, name):
    content = OR_BENCH if name.endswith(".csv") else '{"prompt": "How do grells hum?"}\n{"prompt": "Why?"}\n'
    (question, *_) = read_questions(write(name, codecs.BOM_UTF8 + content.replace("\n", "\r\n").encode()))
    assert question["prompt"] == "How do grells hum?"


def test_every_bad_line_is_named(refused):
    lines = [
        b'{"prompt": "How?", "id": "a"}',
        b'{"promt": "How?"}',
        b"",
        b'{"prompt": "  "}',
        b'{"prompt": "How?", "id": "a"}',
        b'{"prompt": "How?", "id": [1]}',
        b'{"prompt": "na\xefve"}',
        b'{"prompt": "How?"',
        b"[1]",
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "How?", "harmful": 3}',
        b'{"prompt": "How?", "prompt": "Why?"}',
        b"[" * 100_000,
    ]
    told = refused("bad.jsonl", b"\n".join(lines))
    assert told[0] == "the prompts have problems:"
    assert [line.partition(":")[0] for line in told[1:]] == [str(number) for number in (2, *range(4, 14))]
    expected = [
        "has neither `prompt` nor `question`; did you mean 'prompt'?",
        "the prompt must be a string that is not empty",
        "'a' is already used at ",
        "id: must be a string or a whole number, not an array",
        "byte 15 of the line is not UTF-8",
        "not valid JSON at column 18",
        "must be a JSON object, not an array",
        "half of a surrogate pair",
        "harmful: must be a string",
        "'prompt' is there twice",
        "nested too deeply",
    ]
    for line, part in zip(told[1:], expected, strict=True):
        assert part in line


def test_twenty_problems_are_shown_and_the_others_counted(refused):
    told = refused("bad.jsonl", "{}\n" * 25)
    assert len(told) == 1 + 20 + 1
    assert told[-1] == "… and 5 more"


def test_a_broken_document_is_named_by_line_and_column(refused):
    (_, line) = refused("broken.json", '[\n  {"prompt": "How?"},\n  {"prompt": }\n]')
    assert "not valid JSON at line 3, column 14" in line


def test_a_bad_item_of_a_document_is_named(refused):
    (_, item) = refused("list.json", '[{"prompt": "How?"}, 3]')
    assert item == "item 2: must be a JSON object, not a number"
    (_, case) = refused("test_cases.json", '{"make_florp": ["How?", 3]}')
    assert case == "'make_florp', test case 2: the prompt must be a string that is not empty"


def test_a_bad_row_of_a_csv_is_named_by_the_line_it_starts_at(refused):
    rows = '1,"two\nlines",homonyms\n2,,homonyms\n1,Why?,homonyms\n4,Why?\n'
    (_, empty, twice, short) = refused("xstest.csv", "id,prompt,type\n" + rows)
    assert empty == "4: the prompt must be a string that is not empty"
    assert twice.startswith("5: id: '1' is already used at ")
    assert short == "6: has 2 fields, the header 3"


def test_a_label_that_is_no_label_is_refused(refused):
    (_, line) = refused("xstest.csv", "id,prompt,type,label\n1,How?,homonyms,save\n")
    assert line == "2: label: must be safe or unsafe (got 'save')"


@pytest.mark.parametrize("row", ['"How?,grells\n', '"How?"!,grells\n'])
def test_bad_quoting_is_named(refused, row):
    (_, line) = refused("or.csv", f"prompt,category\nWhy?,grells\n{row}")
    assert line.startswith("3: not valid CSV in the row that starts here")


def test_all_lines_of_a_csv_that_are_not_utf8_are_named(refused):
    (_, *lines) = refused("or.csv", b"prompt,category\nna\xefve,a\nfine,b\n\xe9t\xe9,c\n")
    assert lines == ["2: byte 3 of the line is not UTF-8", "4: byte 1 of the line is not UTF-8"]


def test_other_columns_are_named_with_the_nearest_kind(refused):
    (_, line) = refused("what.csv", "id,promt,type\n1,How?,homonyms\n")
    assert line.startswith("1: found the columns id, promt, type, which are none of those expected: HarmBench (")
    assert line.endswith("Nearest is XSTest, where prompt is missing; did you mean 'promt'?")


def test_a_column_that_is_there_twice_is_refused(refused):
    assert refused("or.csv", "prompt,category,prompt\na,b,c\n")[1] == "1: column 'prompt' is there twice"


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.jsonl", ""), ("a.json", "[]"), ("a.json", "{}"), ("a.csv", ""), ("a.csv", "prompt,category\n")],
)
def test_a_file_without_prompts_is_said_so(write, name, content):
    path = write(name, content)
    with pytest.raises(UserError, match=f"^no prompts in {path}$"):
        read_questions(path)


def test_a_missing_file_is_said_so(tmp_path):
    with pytest.raises(UserError, match=f"^no prompts file {tmp_path}/none.csv$"):
        read_questions(tmp_path / "none.csv")


def test_templates_are_filled_question_by_question():
    templates = [{"id": "story", "prompt": "A story: {question}"}, {"id": "twice", "prompt": "{question} {question}"}]
    questions = [{"id": "a", "prompt": "How {x}?", "category": "kites"}, {"id": "b", "behavior": "B", "prompt": "Why?"}]
    filled = fill(templates, questions)
    assert [question["id"] for question in filled] == ["story/a", "twice/a", "story/b", "twice/b"]
    assert [question["behavior"] for question in filled] == ["a", "a", "B", "B"]
    assert filled[1] == {
        "id": "twice/a",
        "prompt": "How {x}? How {x}?",
        "query": "How {x}?",
        "category": "kites",
        "behavior": "a",
        "template": "twice",
    }


def test_a_template_without_a_place_for_the_question_is_refused():
    with pytest.raises(ValueError, match=r"story: no \{question\} in the prompt"):
        fill([{"id": "story", "prompt": "A story"}], [])
