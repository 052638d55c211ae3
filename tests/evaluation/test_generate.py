"""Answers token by token, held against transformers' own `generate`."""

import jax
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from derta_jax.config import MeshShape
from derta_jax.evaluation.generate import Answer, Batch, Request, generate
from derta_jax.interop.hf_load import load_pretrained
from derta_jax.models.decoder import unrolled
from derta_jax.training.mesh import make_mesh
from tests.conftest import write_tiny_model

VOCABULARY = 64
NEW_TOKENS = 8
STOPS = (2, 7, 11, 30)
RANDOM = np.random.default_rng(0)
PROMPTS = [RANDOM.integers(3, VOCABULARY, length).tolist() for length in (9, 1, 13, 4, 14, 2, 16)]
LONG = RANDOM.integers(3, VOCABULARY, 25).tolist()


MANY = [RANDOM.integers(3, VOCABULARY, length).tolist() for length in RANDOM.integers(1, 41, 64)]
MESHES = {
    "one device": MeshShape(fsdp=1),
    "tensor 2, data 4": MeshShape(tensor=2, data=4, fsdp=1),
    "fsdp 4, expert 2": MeshShape(fsdp=4, expert=2),
}


@pytest.fixture(scope="module", params=["llama", "mistral", "mixtral"])
def directory(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("generate") / request.param
    window = {"sliding_window": 5} if request.param == "mistral" else {}
    return write_tiny_model(path, request.param, vocab_size=VOCABULARY, **window)


@pytest.fixture(scope="module")
def referee_answers(directory):
    """Those of transformers to `MANY`, greedily, each prompt alone."""
    referee = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    answers = []
    for prompt in MANY:
        inputs = torch.tensor([prompt])
        generated = referee.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            do_sample=False,
            max_new_tokens=NEW_TOKENS,
            eos_token_id=list(STOPS),
            pad_token_id=0,
        )
        token_ids = generated[0, len(prompt) :].tolist()
        stopped = token_ids[-1] in STOPS
        answers.append(Answer(token_ids[:-1] if stopped else token_ids, "stop" if stopped else "length"))
    return answers


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return unrolled(*load_pretrained(write_tiny_model(tmp_path_factory.mktemp("llama"), vocab_size=VOCABULARY)))


def answers_of(loaded, prompts=PROMPTS, batch_size=3, **options):
    model, params = loaded
    return generate(model, params, prompts, NEW_TOKENS, STOPS, batch_size, **options)


@pytest.mark.parametrize("name", MESHES)
def test_greedy_answers_are_those_of_transformers_token_for_token(directory, referee_answers, name):
    shape = MESHES[name]
    if shape.expert > 1 and "mixtral" not in directory.name:
        shape = MeshShape(fsdp=8)
    devices = jax.devices()[:1] if name == "one device" else jax.devices()
    mesh = make_mesh(shape, devices)
    loaded = unrolled(*load_pretrained(directory, mesh=mesh))
    with jax.set_mesh(mesh):
        answers = answers_of(loaded, MANY, batch_size=16)
    assert answers == referee_answers
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
    assert counts == [1, 2, 3, 4, 5, 6, 7]


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


# A batch whose requests come and go


def batch_of(loaded, stop_ids, size, context):
    model, params = loaded
    return Batch(model, params, stop_ids, size, context)


def generate_with(loaded, *options):
    model, params = loaded
    return generate(model, params, *options)


def run(batch, news):
    """Go on until nothing is left; token ids and finish reason by name."""
    made: dict = {}
    while True:
        for item in news:
            tokens, _ = made.get(item.name, ([], None))
            made[item.name] = (tokens + item.token_ids, item.finish_reason)
        if not batch.running:
            return made
        news = batch.advance(3)


def test_a_request_that_comes_later_is_answered_as_if_it_were_alone(llama):
    batch = batch_of(llama, STOPS, size=3, context=36)
    alone = answers_of(llama)
    news = batch.admit({"first": Request(PROMPTS[0], NEW_TOKENS)})
    for number, prompt in enumerate(PROMPTS[1:6]):
        while not batch.free:
            news += batch.advance(1)
        news += batch.admit({number: Request(prompt, NEW_TOKENS)})
        news += batch.advance(2)
    made = run(batch, news)
    assert made["first"] == (alone[0].token_ids, alone[0].finish_reason)
    for number, answer in enumerate(alone[1:6]):
        assert made[number] == (answer.token_ids, answer.finish_reason)


def test_the_ring_of_columns_is_passed_many_times(llama):
    batch = batch_of(llama, (VOCABULARY,), size=2, context=24)
    expected = generate_with(llama, [PROMPTS[0]], 8, (VOCABULARY,), 1)[0].token_ids
    for _ in range(7):
        assert run(batch, batch.admit({"again": Request(PROMPTS[0], 8)}))["again"] == (expected, "length")


def test_the_padding_of_a_prompt_takes_no_room(llama):
    longest = max(MANY, key=len)
    assert 32 < len(longest) <= 40
    batch = batch_of(llama, (VOCABULARY,), size=2, context=48)
    news = batch.admit({"first": Request(PROMPTS[0], 48 - len(PROMPTS[0]))})
    news += batch.advance(5)
    made = run(batch, news + batch.admit({"long": Request(longest, 48 - len(longest))}))
    for name, prompt in (("first", PROMPTS[0]), ("long", longest)):
        (alone,) = generate_with(llama, [prompt], 48 - len(prompt), (VOCABULARY,))
        assert made[name] == (alone.token_ids, "length")


def test_a_dropped_request_frees_its_slot_and_leaves_the_others_alone(llama):
    batch = batch_of(llama, (VOCABULARY,), size=2, context=16 + NEW_TOKENS)
    news = batch.admit({"stays": Request(PROMPTS[0], NEW_TOKENS), "goes": Request(PROMPTS[2], NEW_TOKENS)})
    batch.drop("goes")
    assert batch.free == 1
    news += batch.admit({"comes": Request(PROMPTS[4], NEW_TOKENS)})
    made = run(batch, news)
    expected = generate_with(llama, [PROMPTS[0], PROMPTS[4]], NEW_TOKENS, (VOCABULARY,))
    assert [made["stays"][0], made["comes"][0]] == [answer.token_ids for answer in expected]


def test_the_last_answers_share_fewer_slots_and_are_the_same(llama):
    batch = batch_of(llama, (VOCABULARY,), size=32, context=48)
    alone = generate_with(llama, PROMPTS, NEW_TOKENS, (VOCABULARY,))
    filling = {f"goes {number}": Request(PROMPTS[0], 1 + (number < 6)) for number in range(25)}
    news = batch.admit(filling | {number: Request(prompt, NEW_TOKENS) for number, prompt in enumerate(PROMPTS)})
    batch.narrow()
    assert batch.size == 32, "six and seven are too many"
    news += batch.advance(1)
    batch.narrow()
    assert batch.size == 8
    made = run(batch, news)
    assert [made[number][0] for number in range(len(PROMPTS))] == [answer.token_ids for answer in alone]
    batch.narrow()
    assert batch.size == 8


def test_each_request_has_its_own_limit_and_temperature(llama):
    batch = batch_of(llama, (VOCABULARY,), size=3, context=25)
    requests = {limit: Request(PROMPTS[0], limit, temperature) for limit, temperature in ((1, 0.0), (9, 0.0), (5, 3.0))}
    made = run(batch, batch.admit(requests))
    assert {name: len(tokens) for name, (tokens, _) in made.items()} == {1: 1, 9: 9, 5: 5}
    assert made[9][0][0] == made[1][0][0]
    assert made[9][0][:5] != made[5][0]
