"""The decoder against transformers' LlamaForCausalLM, MistralForCausalLM and Qwen3ForCausalLM in float32."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from derta_jax.interop.hf_load import load_pretrained
from derta_jax.models.attention import empty_cache
from derta_jax.models.decoder import REMAT_POLICIES, unrolled
from derta_jax.models.params import leaves_with_rows
from tests.conftest import write_tiny_model

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
VARIANTS: dict[str, tuple[str, dict]] = {
    "llama 2": ("llama", {"num_key_value_heads": 4}),
    "llama 3": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0}}),
    "llama 3.1": ("llama", {"rope_parameters": LLAMA3_ROPE}),
    "llama 3.2": ("llama", {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True}),
    "llama with a large eps": ("llama", {"rms_norm_eps": 0.1}),
    "llama with a wide head": ("llama", {"head_dim": 16, "num_key_value_heads": 1}),
    "mistral with a window": ("mistral", {"sliding_window": 5}),
    "mistral without a window": ("mistral", {"sliding_window": None}),
    "qwen 3": ("qwen3", {"tie_word_embeddings": True}),
}
FAMILIES = ["llama 2", "llama 3", "llama 3.1", "mistral with a window", "qwen 3"]
VOCABULARY = 64
TOKENS = np.random.default_rng(0).integers(3, VOCABULARY, (2, 24))
PACKED = [slice(0, 9), slice(9, 11), slice(11, 20)]


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    base = tmp_path_factory.mktemp("variants")
    return {
        name: write_tiny_model(base / name, family, vocab_size=VOCABULARY, **overrides)
        for name, (family, overrides) in VARIANTS.items()
    }


@pytest.fixture(params=["llama 3.2", "mistral with a window"])
def loaded(request, directories):
    return load_pretrained(directories[request.param])


@functools.partial(jax.jit, static_argnums=0)
def apply(model, params, *inputs):
    return model.apply({"params": params}, *inputs)


def logits_of(loaded, *inputs):
    return np.asarray(apply(*loaded, *inputs))


@functools.partial(jax.jit, static_argnums=0)
def next_token_grads(model, params, tokens=TOKENS):
    """Gradients of the mean cross-entropy of each next token."""

    def loss(params):
        log_p = jax.nn.log_softmax(model.apply({"params": params}, tokens)[:, :-1], -1)
        return -jnp.take_along_axis(log_p, tokens[:, 1:, None], -1).mean()

    return jax.grad(loss)(params)


def assert_within(share, actual, expected, name=""):
    """Differences of at most `share` of the largest expected entry."""
    actual, expected = (np.asarray(each, np.float32) for each in (actual, expected))
    largest = np.abs(expected).max(initial=0)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=share * largest, err_msg=name)


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_those_of_transformers(variant, directories):
    referee = AutoModelForCausalLM.from_pretrained(directories[variant], dtype=torch.float32)
    with torch.no_grad():
        expected = referee(torch.tensor(TOKENS)).logits.numpy()
    actual = logits_of(load_pretrained(directories[variant]), TOKENS)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("variant", [*FAMILIES, "llama 3.2"])
def test_the_gradient_of_every_parameter_equals_torchs(variant, directories):
    referee = AutoModelForCausalLM.from_pretrained(directories[variant], dtype=torch.float32)
    tokens = torch.tensor(TOKENS)
    referee(tokens, labels=tokens).loss.backward()
    expected = {name: parameter.grad.numpy() for name, parameter in referee.named_parameters()}

    model, params = load_pretrained(directories[variant])
    grads = next_token_grads(model, params)
    for row, grad in leaves_with_rows(model.config, grads):
        for place, name in row.hf_names(model.config).items():
            actual = grad[place]
            assert_within(1e-5, actual.T if row.transposed else actual, expected.pop(name), name)
    assert not expected


def test_a_sliding_window_shorter_than_the_sequence_matters(directories):
    windowed = logits_of(load_pretrained(directories["mistral with a window"]), TOKENS)
    whole = logits_of(load_pretrained(directories["mistral without a window"]), TOKENS)
    np.testing.assert_allclose(windowed[:, :5], whole[:, :5], rtol=0, atol=2e-5)
    assert np.abs(windowed[:, 5:] - whole[:, 5:]).max() > 0.1


def test_packed_rows_are_computed_as_if_each_were_alone(loaded):
    segments, positions = np.zeros((1, 24), np.int32), np.zeros((1, 24), np.int32)
    for number, row in enumerate(PACKED, start=1):
        segments[0, row] = number
        positions[0, row] = np.arange(row.stop - row.start)
    packed = logits_of(loaded, TOKENS[:1], segments, positions)
    for row in PACKED:
        np.testing.assert_allclose(packed[:, row], logits_of(loaded, TOKENS[:1, row]), rtol=0, atol=2e-5)


def test_what_stands_in_the_padding_does_not_reach_real_tokens(loaded):
    segments = (np.arange(24) < np.array([[9], [24]])).astype(np.int32)
    other_padding = np.where(segments, TOKENS, 1)
    padded, changed = logits_of(loaded, TOKENS, segments), logits_of(loaded, other_padding, segments)
    np.testing.assert_array_equal(padded[segments > 0], changed[segments > 0])
    assert np.isfinite(padded).all()


def test_padding_does_not_change_a_row(loaded):
    segments = (np.arange(24) < np.array([[9], [24]])).astype(np.int32)
    padded = logits_of(loaded, TOKENS, segments)
    np.testing.assert_allclose(padded[:1, :9], logits_of(loaded, TOKENS[:1, :9]), rtol=0, atol=2e-5)


def test_without_segments_and_positions_the_row_is_one_segment_from_position_0(loaded):
    ones, positions = np.ones_like(TOKENS), np.broadcast_to(np.arange(24), TOKENS.shape)
    np.testing.assert_array_equal(logits_of(loaded, TOKENS), logits_of(loaded, TOKENS, ones, positions))


def test_no_token_sees_those_after_it(loaded):
    changed = TOKENS.copy()
    changed[:, 12:] = 3
    before, after = logits_of(loaded, TOKENS), logits_of(loaded, changed)
    np.testing.assert_array_equal(before[:, :12], after[:, :12])


@pytest.mark.parametrize("remat", [name for name in REMAT_POLICIES if name != "none"])
def test_rematerialisation_changes_memory_and_not_gradients(remat, directories):
    model, params = load_pretrained(directories["mistral with a window"])
    kept, recomputed = (next_token_grads(each, params) for each in (model, model.clone(remat=remat)))
    jax.tree.map(lambda actual, expected: assert_within(1e-5, actual, expected), recomputed, kept)


@functools.partial(jax.jit, static_argnums=0)
def decode(model, params, tokens, positions, cache, column):
    """Logits of one token a row, which is written to `column` of the cache, and the cache."""
    hidden, cache = model.apply({"params": params}, tokens, positions, cache, column, method="decode")
    return model.apply({"params": params}, hidden, method="logits"), cache


@functools.partial(jax.jit, static_argnums=(0, 4))
def read(model, params, tokens, positions, columns):
    """Logits of prompts, and a cache of so many columns that begins with theirs."""
    hidden, own = model.apply({"params": params}, tokens, positions, method="read")
    logits = model.apply({"params": params}, hidden, method="logits")
    empty = empty_cache(model.config, len(tokens), columns, model.dtype)
    return logits, jax.tree.map(lambda old, new: jax.lax.dynamic_update_slice(old, new, (0,) * old.ndim), empty, own)


def ready_to_answer(loaded):
    model, params = loaded
    return unrolled(model, jax.tree.map(jnp.copy, params))


def test_decoding_token_by_token_gives_the_logits_of_the_whole_sequence(loaded):
    model, params = ready_to_answer(loaded)
    logits, cache = read(model, params, TOKENS[:, :9], np.broadcast_to(np.arange(9), (2, 9)), 24)
    steps = [*logits.swapaxes(0, 1)]
    for place in range(9, 24):
        logits, cache = decode(model, params, TOKENS[:, place], np.full(2, place), cache, place)
        steps.append(logits)
    np.testing.assert_allclose(np.stack(steps, 1), logits_of(loaded, TOKENS), rtol=0, atol=2e-5)


def test_an_unrolled_model_says_what_the_scanned_one_says(loaded):
    model, params = ready_to_answer(loaded)
    assert not model.scan_layers
    assert unrolled(model, params) == (model, params)
    np.testing.assert_allclose(logits_of((model, params), TOKENS), logits_of(loaded, TOKENS), rtol=0, atol=2e-6)


def test_decoding_skips_cache_columns_that_hold_padding(loaded):
    model, params = ready_to_answer(loaded)
    padding = np.full((2, 4), -1)
    prompt = np.concatenate([TOKENS[:, :5], padding * -1], 1)
    positions = np.concatenate([np.broadcast_to(np.arange(5), (2, 5)), padding], 1)
    _, cache = read(model, params, prompt, positions, 24)
    logits, _ = decode(model, params, TOKENS[:, 5], np.array([5, 5]), cache, 9)
    np.testing.assert_allclose(logits, logits_of(loaded, TOKENS)[:, 5], rtol=0, atol=2e-5)


def test_bfloat16_compute_gives_float32_logits_near_the_float32_ones(loaded):
    model, params = loaded
    narrow = apply(model.clone(dtype=jnp.bfloat16), params, TOKENS)
    assert narrow.dtype == jnp.float32
    exact = logits_of(loaded, TOKENS)
    error = np.abs(narrow - exact)
    assert 0 < error.mean() < 0.01 * np.abs(exact).max()
    assert error.max() < 0.05 * np.abs(exact).max()


@pytest.mark.parametrize("variant", FAMILIES)
def test_in_bfloat16_logits_are_no_further_from_the_truth_than_torchs(variant, directories):
    model, params = load_pretrained(directories[variant])
    referee = AutoModelForCausalLM.from_pretrained(directories[variant], dtype=torch.bfloat16)
    tokens = np.random.default_rng(1).integers(3, VOCABULARY, (24, 24))
    with torch.no_grad():
        theirs = referee(torch.tensor(tokens)).logits.float().numpy()
    exact = logits_of((model, params), tokens)
    ours = logits_of((model.clone(dtype=jnp.bfloat16), params), tokens)
    assert np.abs(ours - exact).mean() <= np.abs(theirs - exact).mean()
    assert np.square(ours - exact).mean() <= np.square(theirs - exact).mean()


def assert_bfloat16_gradients_are_as_near_as_torchs(loaded, referee, named=lambda gradients, _: gradients):
    """Sums over tokens too, as those of the norms and of an embedding that stands in a third of the places.

    Both errors are random, so that one of a short vector may be half as large again as the other. The referee computes
    in bfloat16; `named` gives its gradients (name, array) their names in a checkpoint.
    """
    model, params = loaded
    rng = np.random.default_rng(2)
    tokens = np.where(rng.random((16, 256)) < 1 / 3, 5, rng.integers(3, VOCABULARY, (16, 256)))
    exact, ours = (next_token_grads(each, params, tokens) for each in (model, model.clone(dtype=jnp.bfloat16)))
    log_p = referee(torch.tensor(tokens)).logits[:, :-1].float().log_softmax(-1)
    torch.nn.functional.nll_loss(log_p.flatten(0, 1), torch.tensor(tokens[:, 1:].flatten())).backward()
    gradients = ((name, parameter.grad.float().numpy()) for name, parameter in referee.named_parameters())
    theirs = dict(named(gradients, model.config.ffn_dim))

    pairs = (leaves_with_rows(model.config, grads) for grads in (exact, ours))
    for (row, truth), (_, grad) in zip(*pairs, strict=True):
        error = their_error = 0.0
        for place, name in row.hf_names(model.config).items():
            error += np.square(grad[place] - truth[place]).sum()
            their_error += np.square((theirs[name].T if row.transposed else theirs[name]) - truth[place]).sum()
        assert error**0.5 < 1.5 * their_error**0.5, row.path
    # torch sums the embedding's in bfloat16 where it runs on a CPU: a quarter of it is lost
    assert np.linalg.norm(ours["embed"] - exact["embed"]) < 0.03 * np.linalg.norm(exact["embed"])


@pytest.mark.parametrize("variant", FAMILIES)
def test_in_bfloat16_gradients_are_as_near_to_the_truth_as_torchs(variant, directories):
    referee = AutoModelForCausalLM.from_pretrained(directories[variant], dtype=torch.bfloat16)
    assert_bfloat16_gradients_are_as_near_as_torchs(load_pretrained(directories[variant]), referee)


def test_a_new_models_matrices_have_the_configs_spread_and_norms_are_one(directories):
    model, _ = load_pretrained(directories["llama 3"])
    params = jax.jit(model.init)(jax.random.key(0), TOKENS)["params"]
    assert np.asarray(params["embed"]).std() == pytest.approx(model.config.initializer_range, rel=0.1)
    assert (np.asarray(params["norm"]) == 1).all()
    assert not np.array_equal(params["layers"]["query"][0], params["layers"]["query"][1])
