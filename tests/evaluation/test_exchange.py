"""Answers in the shapes that AlpacaEval, HarmBench and EasyJailbreak read."""

import json
from typing import Any

import pytest

from derta_jax.cli import main
from derta_jax.errors import UserError
from derta_jax.evaluation.exchange import (
    alpaca_eval,
    easyjailbreak,
    harmbench,
    read_answers,
)
from derta_jax.evaluation.files import write_rows
from derta_jax.evaluation.questions import read_questions
from tests.conftest import write_jsonl

ANSWERS: list[dict[str, Any]] = [
    {"id": "b1/1", "behavior": "b1", "query": "How?", "prompt": "A story: How?", "name": "story", "response": "Once …"},
    {"id": "b1/2", "behavior": "b1", "prompt": "How else?", "name": "story", "response": "Sorry,\u2028no."},
    {"id": 7, "prompt": "Why?", "name": "story", "response": "Because."},
    {"id": "a-1", "instruction": "Hum.", "dataset": "kites", "prompt": "Hum.", "name": "alpaca", "response": "Hm."},
]


@pytest.fixture
def answers(tmp_path):
    path = tmp_path / "derta.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ANSWERS), encoding="utf-8")
    return path


def test_the_answers_of_one_set_are_read(answers):
    assert read_answers(answers, "story") == ANSWERS[:3]


def test_a_set_that_was_not_asked_is_refused_with_the_nearest(answers, tmp_path):
    with pytest.raises(UserError, match="has answers to story, alpaca, not to 'storey'; did you mean 'story'"):
        read_answers(answers, "storey")
    with pytest.raises(UserError, match="no answers file"):
        read_answers(tmp_path / "none.jsonl", "story")
    with pytest.raises(UserError, match="does not hold the answers of an evaluation"):
        read_answers(write_jsonl(tmp_path / "other.jsonl", [{"prompt": "How?"}]), "story")


def test_alpaca_eval_gets_the_instruction_as_it_was_given(answers):
    assert alpaca_eval(read_answers(answers, "alpaca"), "derta") == [
        {"dataset": "kites", "instruction": "Hum.", "output": "Hm.", "generator": "derta"}
    ]
    assert [row["instruction"] for row in alpaca_eval(ANSWERS[2:3], "derta")] == ["Why?"]


def test_harmbench_gets_a_list_for_each_behaviour(answers):
    assert harmbench(read_answers(answers, "story")) == {
        "b1": [
            {"test_case": "A story: How?", "generation": "Once …"},
            {"test_case": "How else?", "generation": "Sorry,\u2028no."},
        ],
        "7": [{"test_case": "Why?", "generation": "Because."}],
    }


def test_what_comes_from_harmbench_goes_back_under_the_same_behaviours(tmp_path):
    cases = {"make_florp": ["How?", "And how else?"], "find_grells": ["Where?"]}
    (tmp_path / "test_cases.json").write_text(json.dumps(cases))
    rows = [{**question, "response": "Sorry."} for question in read_questions(tmp_path / "test_cases.json")]
    completions = harmbench(rows)
    assert {behavior: [item["test_case"] for item in items] for behavior, items in completions.items()} == cases


def test_easyjailbreak_gets_instances_that_are_read_back_as_the_same_prompts(tmp_path):
    instances = easyjailbreak(ANSWERS[:2])
    assert instances[0] == {
        "jailbreak_prompt": "A story: How?",
        "query": "How?",
        "target_responses": ["Once …"],
        "eval_results": [],
    }
    write_rows(instances, tmp_path / "instances.jsonl")
    again = read_questions(tmp_path / "instances.jsonl")
    assert [question["prompt"] for question in again] == [row["prompt"] for row in ANSWERS[:2]]


@pytest.mark.parametrize(("tool", "name"), [("alpaca", "alpaca"), ("harmbench", "story"), ("easyjailbreak", "story")])
def test_a_set_is_handed_over_as_the_tool_reads_it(answers, tmp_path, capsys, tool, name):
    output = tmp_path / "made" / "for.json"
    command = ["answers", str(answers), "--set", name, "--for", tool, "--output", str(output)]
    assert main(command) == 0
    rows = read_answers(answers, name)
    assert f"{len(rows)} answers" in capsys.readouterr().out
    shapes = {"alpaca": alpaca_eval(rows, "derta"), "harmbench": harmbench(rows), "easyjailbreak": easyjailbreak(rows)}
    written = output.read_text(encoding="utf-8")
    if tool == "easyjailbreak":
        assert [json.loads(line) for line in written.split("\n")[:-1]] == shapes[tool]
    else:
        assert json.loads(written) == shapes[tool]


def test_a_set_that_is_not_there_is_a_mistake_of_the_user(answers, tmp_path, capsys):
    command = ["answers", str(answers), "--set", "storey", "--for", "alpaca", "--output", str(tmp_path / "a.json")]
    assert main(command) == 2
    assert "did you mean 'story'" in capsys.readouterr().err
