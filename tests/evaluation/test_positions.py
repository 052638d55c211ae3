"""Where refusals begin, and how likely one is at each point of an answer."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from derta_jax.evaluation.judging.rules import DEFAULT_JUDGE
from derta_jax.evaluation.positions import curve, position_shares, refusal_position, refusal_probabilities
from derta_jax.interop.hf_load import load_pretrained
from derta_jax.interop.tokenizer import load_tokenizer

NOTHING = {"le_5": None, "6_30": None, "gt_30": None, "glued": None}


@pytest.fixture(scope="module")
def tokenizer(tiny_llama):
    return load_tokenizer(tiny_llama)


def position_of(tokenizer, *parts):
    return refusal_position(DEFAULT_JUDGE, tokenizer, [token for part in parts for token in tokenizer.encode(part)])


def test_a_refusal_in_the_first_token_is_at_position_1(tokenizer):
    assert position_of(tokenizer, "Sorry, I cannot help with that.") == 1


@pytest.mark.parametrize("start", ["First do one thing,", "Café 東京 😀"])
@pytest.mark.parametrize("refusal", ["Sorry, I cannot help with that.", " Sorry, I cannot help with that."])
def test_a_later_refusal_is_at_the_token_that_holds_its_first_character(tokenizer, start, refusal):
    assert position_of(tokenizer, start, refusal) == len(tokenizer.encode(start)) + 1


@pytest.mark.parametrize("text", ["", "First do one thing, then another thing."])
def test_an_answer_without_a_refusal_has_no_position(tokenizer, text):
    assert position_of(tokenizer, text) is None


def test_shares_are_of_refusals_within_5_tokens_to_30_and_beyond():
    shares = position_shares([1, 5, 6, 30, 31], ["Sorry, no."] * 5)
    assert shares == {"le_5": 0.4, "6_30": 0.4, "gt_30": 0.2, "glued": 0.0}


def test_the_glued_share_is_of_refusals_stuck_to_the_word_before():
    assert position_shares([3, 3], ["take aSorry, no.", "take a Sorry, no."])["glued"] == 0.5


def test_where_nothing_was_refused_there_are_no_shares():
    assert position_shares([], []) == NOTHING


@pytest.mark.parametrize("family", ["tiny_llama", "tiny_mistral"])
def test_refusal_probabilities_are_those_of_a_plain_forward_pass(family, request):
    directory = request.getfixturevalue(family)
    random = np.random.default_rng(0)
    pairs = [[random.integers(3, 300, length).tolist() for length in lengths] for lengths in [(4, 9), (7, 1), (9, 7)]]
    prompts, answers = zip(*pairs, strict=True)
    model, params = load_pretrained(directory)
    probabilities = refusal_probabilities(model, params, prompts, answers, 42, batch_size=2)

    referee = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    for prompt, answer, actual in zip(prompts, answers, probabilities, strict=True):
        with torch.no_grad():
            logits = referee(torch.tensor([prompt + answer])).logits[0]
        expected = torch.softmax(logits, -1)[len(prompt) - 1 : -1, 42]
        np.testing.assert_allclose(actual, expected, rtol=1e-4)


def test_the_curve_has_mean_and_band_by_position():
    tenths = [np.array([share / 10, 0.5]) for share in range(11)]
    figures = curve(tenths)
    assert figures["mean"] == pytest.approx([0.5, 0.5])
    assert figures["low"] == pytest.approx([0.1, 0.5])
    assert figures["high"] == pytest.approx([0.9, 0.5])


def test_the_curve_reaches_as_far_as_half_of_the_answers():
    figures = curve([np.ones(2), np.ones(4), np.zeros(9)])
    assert figures["mean"] == pytest.approx([2 / 3, 2 / 3, 0.5, 0.5])


def test_no_answers_have_no_curve():
    assert curve([]) == {"mean": [], "low": [], "high": []}
