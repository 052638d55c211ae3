"""Answers token by token, held against transformers' own `generate`."""

import jax
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from derta_jax.evaluation.generate import generate
from derta_jax.interop.hf_load import load_pretrained
from tests.conftest import write_tiny_model

VOCABULARY = 64
NEW_TOKENS = 8
STOPS = (2, 7, 11, 30)
RANDOM = np.random.default_rng(0)
PROMPTS = [RANDOM.integers(3, VOCABULARY, length).tolist() for length in (9, 1, 13, 4, 14, 2, 16)]
LONG = RANDOM.integers(3, VOCABULARY, 25).tolist()


@pytest.fixture(scope="module", params=["llama", "mistral"])
def directory(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("generate") / request.param
    window = {"sliding_window": 5} if request.param == "mistral" else {}
    return write_tiny_model(path, request.param, vocab_size=VOCABULARY, **window)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return load_pretrained(write_tiny_model(tmp_path_factory.mktemp("llama"), vocab_size=VOCABULARY))


def answers_of(loaded, prompts=PROMPTS, batch_size=3, **options):
    model, params = loaded
    return generate(model, params, prompts, NEW_TOKENS, STOPS, batch_size, **options)


def test_greedy_answers_are_those_of_transformers_token_for_token(directory):
    referee = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    prompts = [LONG, *PROMPTS[:2]]
    answers = answers_of(load_pretrained(directory), prompts)
    for prompt, answer in zip(prompts, answers, strict=True):
        inputs = torch.tensor([prompt])
        generated = referee.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            do_sample=False,
            max_new_tokens=NEW_TOKENS,
            eos_token_id=list(STOPS),
            pad_token_id=0,
        )
        expected = generated[0, len(prompt) :].tolist()
        stopped = expected[-1] in STOPS
        assert answer.token_ids == (expected[:-1] if stopped else expected)
        assert answer.finish_reason == ("stop" if stopped else "length")
    assert {answer.finish_reason for answer in answers} == {"stop", "length"}


@pytest.mark.parametrize("batch_size", [1, 7])
def test_the_batch_size_does_not_change_answers_or_their_order(llama, batch_size):
    assert answers_of(llama, batch_size=batch_size) == answers_of(llama)


def test_answers_come_in_the_order_of_the_prompts(llama):
    backwards = answers_of(llama, prompts=PROMPTS[::-1])
    assert backwards[::-1] == answers_of(llama)


def test_no_prompts_have_no_answers(llama):
    assert answers_of(llama, prompts=[]) == []


def test_a_stop_token_ends_the_answer_and_is_not_part_of_it(llama):
    for answer in answers_of(llama):
        assert not set(answer.token_ids) & set(STOPS)
        assert (answer.finish_reason == "length") == (len(answer.token_ids) == NEW_TOKENS)


def test_progress_counts_up_to_all_prompts(llama):
    counts: list[int] = []
    answers_of(llama, progress=counts.append)
    assert counts == [3, 6, 7]


def test_temperature_zero_is_greedy_whatever_the_seed(llama):
    assert answers_of(llama, temperature=0.0, seed=5) == answers_of(llama)


def test_a_seed_gives_the_same_samples_in_any_batch_size(llama):
    sampled = answers_of(llama, temperature=1.0, seed=1)
    assert sampled == answers_of(llama, temperature=1.0, seed=1)
    assert sampled == answers_of(llama, temperature=1.0, seed=1, batch_size=7)


def test_another_seed_gives_other_samples(llama):
    assert answers_of(llama, temperature=1.0, seed=1) != answers_of(llama, temperature=1.0, seed=2)


def test_equal_prompts_are_sampled_independently(llama):
    first, second = answers_of(llama, prompts=PROMPTS[:1] * 2, temperature=2.0)
    assert first != second


def test_samples_follow_the_softmax_at_the_temperature(llama):
    model, params = llama
    prompt, temperature, count = PROMPTS[0], 2.0, 2000
    logits = jax.jit(lambda tokens: model.apply({"params": params}, tokens))(np.array([prompt]))[0, -1]
    expected = np.asarray(jax.nn.softmax(logits / temperature))
    answers = generate(model, params, [prompt] * count, 1, (VOCABULARY,), count, temperature)
    seen = np.bincount([answer.token_ids[0] for answer in answers], minlength=VOCABULARY)
    assert np.abs(seen / count - expected).max() < 0.03
    assert np.abs(seen / count - jax.nn.softmax(logits)).max() > 0.06
