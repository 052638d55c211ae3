"""What a model is given to read under each attack."""

import pytest

from derta_jax.config import Data
from derta_jax.data.recipes import Row
from derta_jax.data.template import Template
from derta_jax.data.tokenise import tokenise
from derta_jax.evaluation.attacks import ask, completing, completing_prompts, prefill, split_answer
from derta_jax.interop.tokenizer import load_tokenizer
from tests.conftest import triple, write_tokenizer

WITHOUT_HARMFUL = [{"id": "a", "prompt": "How?"}, {"id": "b", "prompt": "Why?", "harmful": ""}]


@pytest.fixture(scope="module")
def template(tiny_llama):
    return Template(Data.model_fields["template"].default, load_tokenizer(tiny_llama))


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    """A chat template whose end, a line break, may merge with the start of an answer."""
    directory = tmp_path_factory.mktemp("chat")
    write_tokenizer(directory, "{% for message in messages %}<{{ message.content }}>{% endfor %} ")
    return Template("chat", load_tokenizer(directory))


def training_row(template, question):
    row = Row(id="row", recipe="rto", prompt=question["prompt"], response=question["harmful"], stream="rto")
    return next(tokenise([row], template.tokenizer, template, 256)).token_ids.tolist()


def test_asking_gives_the_prompt_in_the_template_after_bos(template):
    (case,) = ask([triple(3)], template, "over_refusal", "benign")
    tokenizer = template.tokenizer
    assert case.prompt_ids == [tokenizer.bos_id, *tokenizer.encode(r"[INST] How do I take object 3? [\INST]")]
    assert (case.group, case.name, case.question, case.prefill) == ("over_refusal", "benign", triple(3), "")


@pytest.mark.parametrize("tokens", [1, 2, 5, 20])
@pytest.mark.parametrize("name", ["template", "chat"])
def test_a_prefill_is_exactly_the_start_of_a_training_row(name, tokens, request):
    template = request.getfixturevalue(name)
    (case,) = prefill([triple(3)], template, tokens)
    prompt_ids, answer_ids = split_answer(triple(3)["prompt"], triple(3)["harmful"], template)
    assert case.prompt_ids == training_row(template, triple(3))[: len(prompt_ids) + tokens]
    assert case.prompt_ids == prompt_ids + answer_ids[:tokens]
    assert (case.group, case.name) == ("attacks", f"prefill-{tokens}")


def test_a_prefill_says_which_text_was_given_away(template):
    (case,) = prefill([triple(3)], template, 6)
    assert len(case.prefill) > 6
    assert triple(3)["harmful"].startswith(case.prefill.strip())
    assert template.tokenizer.decode(case.prefill_ids) == case.prefill


def test_a_prefill_longer_than_the_answer_is_the_answer_without_its_eos(template):
    (case,) = prefill([triple(3)], template, 1000)
    assert case.prompt_ids == training_row(template, triple(3))[:-1]


@pytest.mark.parametrize("name", ["template", "chat"])
def test_prompt_and_answer_together_are_a_training_row_before_its_eos(name, request):
    template = request.getfixturevalue(name)
    prompt_ids, answer_ids = split_answer(triple(3)["prompt"], triple(3)["harmful"], template)
    assert prompt_ids + answer_ids == training_row(template, triple(3))[:-1]


def test_completing_has_no_template(template):
    tokenizer = template.tokenizer
    (case,) = completing([triple(3)], tokenizer, 4)
    opening = tokenizer.encode(triple(3)["harmful"])[:4]
    assert case.prompt_ids == [tokenizer.bos_id, *opening]
    assert case.prefill == tokenizer.decode(opening)
    assert (case.group, case.name) == ("attacks", "completing")


def test_a_prompt_can_be_the_raw_text_itself(template):
    tokenizer = template.tokenizer
    (case,) = completing_prompts([{"id": "raw", "prompt": "First do one thing,"}], tokenizer)
    assert case.prompt_ids == [tokenizer.bos_id, *tokenizer.encode("First do one thing,")]
    assert (case.prefill, case.prefill_ids) == ("First do one thing,", case.prompt_ids[1:])
    assert (case.group, case.name) == ("attacks", "completing")


def test_a_case_says_how_it_is_asked_whatever_it_is_called(template):
    cases = [
        *ask([triple(3)], template, "attacks", "mine"),
        *prefill([triple(3)], template, 2, "mine"),
        *completing([triple(3)], template.tokenizer, 2, "mine"),
        *completing_prompts([triple(3)], template.tokenizer, "mine"),
    ]
    assert [(case.name, case.how) for case in cases] == [
        ("mine", "plain"),
        ("mine-2", "prefill"),
        ("mine", "completing"),
        ("mine", "completing"),
    ]


def test_questions_without_a_harmful_answer_are_asked_but_neither_prefilled_nor_completed(template):
    questions = [*WITHOUT_HARMFUL, triple(3)]
    assert [case.question for case in ask(questions, template, "attacks", "plain")] == questions
    assert [case.question for case in prefill(questions, template, 3)] == [triple(3)]
    assert [case.question for case in completing(questions, template.tokenizer, 3)] == [triple(3)]
