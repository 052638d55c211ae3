"""Conversations as text, in the tokenizer's chat template and in ours."""

import pytest

from derta_jax.data.template import Template
from derta_jax.errors import UserError
from derta_jax.evaluation.adapters.conversation import conversation_text
from derta_jax.interop.tokenizer import load_tokenizer

SYSTEM = {"role": "system", "content": "Be brief."}
FIRST, ANSWER, SECOND = (
    {"role": "user", "content": "How?"},
    {"role": "assistant", "content": "With paper."},
    {"role": "user", "content": "And then?"},
)
BEGUN = {"role": "assistant", "content": "Then"}


@pytest.fixture(scope="module")
def tokenizer(chatting):
    return load_tokenizer(chatting)


@pytest.fixture(scope="module")
def ours(tokenizer):
    return Template("[INST] {prompt} [\\INST]", tokenizer)


@pytest.mark.parametrize(
    ("turns", "expected"),
    [
        ([FIRST], "[INST] How? [\\INST]"),
        ([SYSTEM, FIRST], "[INST] Be brief.\n\nHow? [\\INST]"),
        ([FIRST, BEGUN], "[INST] How? [\\INST] Then"),
        ([FIRST, ANSWER, SECOND], "[INST] How? [\\INST] With paper.</s>[INST] And then? [\\INST]"),
        ([FIRST, ANSWER, SECOND, BEGUN], "[INST] How? [\\INST] With paper.</s>[INST] And then? [\\INST] Then"),
    ],
)
def test_our_template_writes_turns_as_it_writes_training_rows(ours, turns, expected):
    assert conversation_text(turns, ours) == expected


def test_a_chat_template_ends_where_the_answer_starts_or_goes_on(tokenizer):
    chat = Template("chat", tokenizer)
    assert conversation_text([FIRST], chat) == "<s>user: How?</s><s>assistant: "
    assert conversation_text([FIRST, BEGUN], chat) == "<s>user: How?</s><s>assistant: Then"


@pytest.mark.parametrize("turns", [[], [SYSTEM], [FIRST, SECOND], [ANSWER], [{"role": "tool", "content": "3"}, FIRST]])
def test_turns_that_have_no_place_are_a_mistake(ours, turns):
    with pytest.raises(UserError, match="turn"):
        conversation_text(turns, ours)


def test_what_a_chat_template_says_against_the_turns_is_passed_on(tokenizer, tmp_path):
    tokenizer.hf.save_pretrained(tmp_path)
    strict = load_tokenizer(tmp_path)
    strict.hf.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
    )
    with pytest.raises(UserError, match=r"no place for these turns \(system, user\): no system here"):
        conversation_text([SYSTEM, FIRST], Template("chat", strict))
