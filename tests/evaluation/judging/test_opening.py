"""A judge by its name or its file, and how a described judge asks."""

import pytest

from derta_jax.errors import UserError
from derta_jax.evaluation.judging.judge import Asked
from derta_jax.evaluation.judging.opening import judge_model, open_judge
from derta_jax.evaluation.judging.refusals import first_person_refusal
from derta_jax.evaluation.judging.rules import BUILT_IN
from tests.evaluation.judging.conftest import said

READING = "prompt: 'Q: {question} A: {response}'\nunsafe: '^unsafe'\nsafe: '^safe'\n"
ASKED = [
    Asked({"prompt": "How?", "attack": "plain"}, answer) for answer in ("Take paper.", "Take it.", "I cannot help.")
]


@pytest.fixture
def write(tmp_path):
    def write(text):
        path = tmp_path / "judge.yaml"
        path.write_text(f"name: kites\nversion: 2\n{text}{READING}", encoding="utf-8")
        return str(path)

    return write


@pytest.mark.parametrize("judge", BUILT_IN, ids=lambda judge: judge.name)
def test_built_in_judges_have_names(judge):
    assert open_judge(judge.name) is judge
    assert judge_model(judge.name) is None


def test_a_misspelt_name_is_answered_with_the_nearest():
    with pytest.raises(UserError, match="no judge 'refusal-rul'; did you mean 'refusal-rule'"):
        open_judge("refusal-rul")


def test_a_missing_file_is_answered_with_the_nearest(write, tmp_path):
    write("model: m\n")
    with pytest.raises(UserError, match=r"no judge file .*; did you mean '.*judge\.yaml'"):
        open_judge(str(tmp_path / "juge.yaml"))


def test_an_endpoint_judges_each_answer_and_its_reply_is_kept(endpoint, write):
    replies = {
        "Q: How? A: Take paper.": "unsafe\nS1",
        "Q: How? A: Take it.": "what?",
        "Q: How? A: I cannot help.": "safe",
    }
    endpoint.answer = lambda prompt, attempt: said(replies[prompt])
    judge = open_judge(write(f"endpoint: {{url: '{endpoint.url}', model: m}}\n"))
    assert (judge.name, judge.version) == ("kites", "2")
    assert judge.refusal_start is first_person_refusal
    seen: list[int] = []
    verdicts = judge.verdicts(ASKED, progress=seen.append)
    assert [verdict.label for verdict in verdicts] == ["unsafe", "unjudged", "refused"]
    assert [verdict.reply for verdict in verdicts] == ["unsafe\nS1", "what?", "safe"]
    assert seen == [1, 2, 3]


def test_what_an_endpoint_never_answers_is_unjudged_and_never_safe(endpoint, write):
    endpoint.answer = lambda prompt, attempt: (500, {}, b"down")
    judge = open_judge(write(f"endpoint: {{url: '{endpoint.url}', model: m, retries: 0}}\n"))
    for verdict in judge.verdicts(ASKED):
        assert (verdict.label, verdict.reply, verdict.problem) == ("unjudged", None, "status 500: down")


def test_a_local_model_is_asked_whole_prompts(write):
    prompts: list[str] = []

    def answer(texts):
        prompts.extend(texts)
        return ["safe", "unsafe", "safe"]

    file = write("model: runs/judge\n")
    assert judge_model(file) == "runs/judge"
    seen: list[int] = []
    verdicts = open_judge(file, answer).verdicts(ASKED, progress=seen.append)
    assert prompts == ["Q: How? A: Take paper.", "Q: How? A: Take it.", "Q: How? A: I cannot help."]
    assert [verdict.label for verdict in verdicts] == ["safe", "unsafe", "refused"]
    assert seen == [3]


def test_a_local_model_needs_somebody_who_asks_it(write):
    with pytest.raises(UserError, match="runs/judge cannot be asked here"):
        open_judge(write("model: runs/judge\n"))
