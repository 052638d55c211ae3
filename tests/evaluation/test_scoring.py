"""Log-probabilities of continuations, held against a plain forward pass of transformers."""

import jax
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from derta_jax.config import MeshShape
from derta_jax.evaluation.scoring import LOGITS_AT_A_TIME, Score, scores
from derta_jax.interop.hf_load import load_pretrained
from derta_jax.training.mesh import make_mesh
from tests.conftest import write_tiny_model

VOCABULARY = 64
RANDOM = np.random.default_rng(0)
SIZES = [(5, 1), (1, 1), (9, 3), (15, 1), (16, 1), (17, 2), (3, 29), (12, 20)]


def draw(length):
    return RANDOM.integers(3, VOCABULARY, length).tolist()


PAIRS = [(draw(context), draw(continuation)) for context, continuation in SIZES]
CHOICES = [(PAIRS[3][0], [token]) for token in (4, 5, 6, 7, 8)]
MESHES = {
    "one device": MeshShape(fsdp=1),
    "tensor 2, data 4": MeshShape(tensor=2, data=4, fsdp=1),
    "fsdp 4, expert 2": MeshShape(fsdp=4, expert=2),
}


@pytest.fixture(scope="module", params=["llama", "mistral", "mixtral"])
def directory(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("scoring") / request.param
    window = {"sliding_window": 5} if request.param == "mistral" else {}
    return write_tiny_model(path, request.param, vocab_size=VOCABULARY, **window)


@pytest.fixture(scope="module")
def referee(directory):
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return load_pretrained(write_tiny_model(tmp_path_factory.mktemp("llama"), vocab_size=VOCABULARY))


def expected_score(referee, context, continuation):
    with torch.no_grad():
        logits = referee(torch.tensor([[*context, *continuation]])).logits[0, len(context) - 1 : -1]
    wanted = torch.tensor(continuation)
    own = torch.log_softmax(logits, -1)[torch.arange(len(continuation)), wanted]
    return own.sum().item(), bool((logits.argmax(-1) == wanted).all())


def scores_of(loaded, pairs, batch_size=32, **options) -> list[Score]:
    model, params = loaded
    return scores(model, params, pairs, batch_size, **options)


def each_token(context, *before):
    """The context, and after it `before` and each token of the vocabulary."""
    return [(context, [*before, token]) for token in range(VOCABULARY)]


def greedy_continuation(referee, context, length):
    tokens = list(context)
    for _ in range(length):
        with torch.no_grad():
            tokens.append(int(referee(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(context) :]


@pytest.mark.parametrize("name", MESHES)
def test_scores_are_those_of_a_plain_forward_pass(directory, referee, name):
    shape = MESHES[name]
    if shape.expert > 1 and "mixtral" not in directory.name:
        shape = MeshShape(fsdp=8)
    mesh = make_mesh(shape, jax.devices()[:1] if name == "one device" else jax.devices())
    model, params = load_pretrained(directory, mesh=mesh)
    pairs = [*PAIRS, *CHOICES, (PAIRS[0][0], greedy_continuation(referee, PAIRS[0][0], 6))]
    with jax.set_mesh(mesh):
        made = scores(model, params, pairs, batch_size=4)
    for pair, score in zip(pairs, made, strict=True):
        total, greedy = expected_score(referee, *pair)
        assert score.log_probability == pytest.approx(total, abs=1e-4)
        assert score.greedy == greedy
    assert made[-1].greedy


def test_a_continuation_is_greedy_only_if_all_of_its_tokens_are(llama):
    context = PAIRS[0][0]
    (best,) = [token for token, score in enumerate(scores_of(llama, each_token(context))) if score.greedy]
    assert sum(score.greedy for score in scores_of(llama, each_token(context, best))) == 1
    assert not any(score.greedy for score in scores_of(llama, each_token(context, best + 1)))


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_the_batch_size_does_not_change_scores_or_their_order(llama, batch_size):
    close(scores_of(llama, PAIRS + CHOICES, batch_size), scores_of(llama, PAIRS + CHOICES))


def test_logits_of_a_long_continuation_are_made_in_parts(llama, tmp_path):
    directory = write_tiny_model(tmp_path, vocab_size=VOCABULARY)
    referee = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    pair = draw(7), draw(2 * LOGITS_AT_A_TIME - 100)
    (score,) = scores_of(llama, [pair])
    assert score.log_probability == pytest.approx(expected_score(referee, *pair)[0], rel=1e-5)


def test_choices_of_one_token_are_read_together(llama):
    counts: list[int] = []
    made = scores_of(llama, CHOICES, batch_size=1, progress=counts.append)
    assert counts == [len(CHOICES)]
    assert len({score.log_probability for score in made}) == len(CHOICES)


def test_the_probabilities_of_all_next_tokens_add_up_to_one(llama):
    made = scores_of(llama, each_token(PAIRS[0][0]))
    assert sum(np.exp(score.log_probability) for score in made) == pytest.approx(1, abs=1e-5)
    assert sum(score.greedy for score in made) == 1


def test_equal_pairs_have_equal_scores_each(llama):
    first, second = scores_of(llama, PAIRS[:1] * 2)
    assert first == second


def test_progress_counts_up_to_all_pairs(llama):
    counts: list[int] = []
    scores_of(llama, PAIRS + CHOICES, 4, progress=counts.append)
    assert counts == sorted(counts)
    assert counts[-1] == len(PAIRS + CHOICES)


def test_no_pairs_have_no_scores(llama):
    assert scores_of(llama, []) == []


def close(actual: list[Score], expected: list[Score]) -> None:
    assert [score.greedy for score in actual] == [score.greedy for score in expected]
    np.testing.assert_allclose(
        [score.log_probability for score in actual], [score.log_probability for score in expected], atol=1e-4
    )
