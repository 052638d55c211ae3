"""The mixture of experts against transformers' MixtralForCausalLM, on every mesh, and its TPU kernels against XLA."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from derta_jax.config import MeshShape
from derta_jax.interop.hf_load import load_pretrained
from derta_jax.models import moe
from derta_jax.models.lora import LowRank, factor_shapes, factor_sharding, target_rows
from derta_jax.models.moe import Routing, load_balancing_loss, mix_experts, route
from derta_jax.models.params import leaves_with_rows
from derta_jax.training.mesh import make_mesh
from tests.conftest import write_tiny_model
from tests.models.interpreted import interpret_tpu_kernels
from tests.models.test_decoder import (
    assert_bfloat16_gradients_are_as_near_as_torchs,
    assert_within,
    decode,
    read,
    ready_to_answer,
)

VOCABULARY = 64
TOKENS = np.random.default_rng(0).integers(3, VOCABULARY, (8, 12))
REAL = np.arange(12) < np.array([12, 12, 3, 12, 7, 12, 12, 1])[:, None]
COEFFICIENT = 0.02
MESHES = {
    "fsdp 8": MeshShape(fsdp=8),
    "expert 4 × tensor 2": MeshShape(expert=4, tensor=2),
    "data 2 × fsdp 2 × expert 2": MeshShape(data=2, fsdp=2, expert=2),
    "fsdp 2 × expert 2 × tensor 2": MeshShape(fsdp=2, expert=2, tensor=2),
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("mixtral"), "mixtral", vocab_size=VOCABULARY)


@pytest.fixture(scope="module")
def loaded(directory):
    return load_pretrained(directory)


@pytest.fixture
def referee(directory):
    options = {"output_router_logits": True, "router_aux_loss_coef": COEFFICIENT}
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, **options)


@functools.partial(jax.jit, static_argnums=0)
def apply(model, params, *inputs):
    return model.apply({"params": params}, *inputs)


@functools.partial(jax.jit, static_argnums=0)
def auxiliary_loss(model, params, tokens, real):
    _, written = model.apply({"params": params}, tokens, real.astype(jnp.int32), mutable=["router"])
    (statistics,) = written["router"]["layers"]["statistics"]
    return load_balancing_loss(statistics, real.sum())


def next_token_loss(model, variables, key=None):
    """Mean cross-entropy of the real next tokens of `TOKENS`, and the auxiliary loss by its coefficient."""
    rngs = None if key is None else {"dropout": key}
    logits, written = model.apply(variables, TOKENS, REAL.astype(np.int32), rngs=rngs, mutable=["router"])
    log_p = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1], -1), TOKENS[:, 1:, None], -1)[..., 0]
    (statistics,) = written["router"]["layers"]["statistics"]
    loss = -(log_p * REAL[:, 1:]).sum() / REAL[:, 1:].sum()
    return loss + COEFFICIENT * load_balancing_loss(statistics, REAL.sum())


def as_on_disk(tensors, ffn):
    """transformers fuses the experts in memory; the names and tensors of a checkpoint."""
    for name, tensor in tensors:
        module = name.partition(".mlp.")[0] + ".block_sparse_moe"
        if name.endswith("mlp.gate.weight"):
            yield f"{module}.gate.weight", tensor
        elif name.endswith("gate_up_proj"):
            for expert, (gate, up) in enumerate(zip(tensor[:, :ffn], tensor[:, ffn:], strict=True)):
                yield f"{module}.experts.{expert}.w1.weight", gate
                yield f"{module}.experts.{expert}.w3.weight", up
        elif name.endswith("down_proj"):
            for expert, down in enumerate(tensor):
                yield f"{module}.experts.{expert}.w2.weight", down
        else:
            yield name, tensor


def test_logits_equal_those_of_transformers(referee, loaded):
    with torch.no_grad():
        expected = referee(torch.tensor(TOKENS)).logits.numpy()
    np.testing.assert_allclose(apply(*loaded, TOKENS), expected, rtol=0, atol=2e-5)


def test_the_gradient_of_every_parameter_equals_torchs(referee, loaded):
    model, params = loaded
    real = torch.tensor(REAL)
    labels = torch.tensor(TOKENS).masked_fill(~real, -100)
    result = referee(torch.tensor(TOKENS), attention_mask=real.long(), labels=labels)
    result.loss.backward()
    gradients = ((name, parameter.grad.numpy()) for name, parameter in referee.named_parameters())
    expected = dict(as_on_disk(gradients, model.config.ffn_dim))

    loss, grads = jax.jit(jax.value_and_grad(lambda params: next_token_loss(model, {"params": params})))(params)
    assert float(loss) == pytest.approx(result.loss.item(), rel=1e-6)
    for row, grad in leaves_with_rows(model.config, grads):
        for place, name in row.hf_names(model.config).items():
            actual = grad[place]
            assert_within(1e-5, actual.T if row.transposed else actual, expected.pop(name), name)
    assert not expected


@pytest.mark.parametrize("real", [np.ones_like(REAL), REAL], ids=["every token", "padded rows"])
def test_the_auxiliary_loss_equals_that_of_transformers_over_real_tokens(real, referee, loaded):
    with torch.no_grad():
        logits = referee(torch.tensor(TOKENS), attention_mask=torch.tensor(real).long()).router_logits
        expected = load_balancing_loss_func(logits, 4, 2, torch.tensor(real)).item()
    assert float(auxiliary_loss(*loaded, TOKENS, real)) == pytest.approx(expected, rel=1e-6)
    assert expected != pytest.approx(2, rel=1e-3), "an even load would prove nothing"


def test_in_bfloat16_logits_are_no_further_from_the_truth_than_torchs(referee, loaded):
    model, params = loaded
    tokens = np.random.default_rng(0).integers(3, VOCABULARY, (32, 32))
    with torch.no_grad():
        exact = referee(torch.tensor(tokens)).logits.numpy()
        theirs = referee.bfloat16()(torch.tensor(tokens)).logits.float().numpy()
    ours = apply(model.clone(dtype=jnp.bfloat16), params, tokens)
    error, their_error = np.abs(ours - exact), np.abs(theirs - exact)
    assert 0 < error.mean() <= their_error.mean()
    assert error.max() <= their_error.max()


def test_in_bfloat16_gradients_are_as_near_to_the_truth_as_torchs(directory, loaded):
    referee = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    assert_bfloat16_gradients_are_as_near_as_torchs(loaded, referee, as_on_disk)


PACKED = [slice(0, 10), slice(10, 20)]


def test_packed_rows_are_computed_as_if_each_were_alone(loaded):
    row = np.resize(TOKENS, (1, 24))
    segments, positions = np.zeros((1, 24), np.int32), np.zeros((1, 24), np.int32)
    for number, part in enumerate(PACKED, start=1):
        segments[0, part] = number
        positions[0, part] = np.arange(part.stop - part.start)
    packed = apply(*loaded, row, segments, positions)
    for part in PACKED:
        np.testing.assert_allclose(packed[:, part], apply(*loaded, row[:, part]), rtol=0, atol=2e-5)
    assert np.isfinite(packed).all()


def test_decoding_token_by_token_gives_the_logits_of_the_whole_sequence(loaded):
    model, params = ready_to_answer(loaded)
    logits, cache = read(model, params, TOKENS[:, :7], np.broadcast_to(np.arange(7), (8, 7)), 12)
    steps = [*logits.swapaxes(0, 1)]
    for place in range(7, 12):
        logits, cache = decode(model, params, TOKENS[:, place], np.full(8, place), cache, place)
        steps.append(logits)
    np.testing.assert_allclose(np.stack(steps, 1), apply(*loaded, TOKENS), rtol=0, atol=2e-5)


# Meshes


def random_adapter(config, mesh):
    """An adapter on everything that can have one, in which no factor is zero."""
    draw = np.random.default_rng(1)

    def factors(row):
        arrays = {name: draw.normal(0, 0.1, shape) for name, shape in factor_shapes(config, row, 4).items()}
        return {
            name: jax.device_put(array.astype(np.float32), factor_sharding(row, name, mesh))
            for name, array in arrays.items()
        }

    return {row.name: factors(row) for row in target_rows(config)}


def loss_and_gradients(directory, mesh, dropout):
    """Of parameters and adapter."""
    model, params = load_pretrained(directory, mesh=mesh)
    model = model.clone(lora_dropout=dropout)
    adapter = random_adapter(model.config, mesh)
    scales = {"layers": {"some name": dict.fromkeys(adapter, 2.0)}}

    def loss(params, adapter):
        variables = {"params": params, "lora": {"layers": {"some name": adapter}}, "lora_scale": scales}
        return next_token_loss(model, variables, jax.random.key(3))

    shardings = jax.tree.map(lambda x: x.sharding, (params, adapter))
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)), out_shardings=(None, shardings))(params, adapter)


@pytest.fixture(scope="module")
def single(directory):
    """What one device computes, at each rate of dropout."""
    return functools.cache(lambda dropout: jax.tree.map(np.asarray, loss_and_gradients(directory, None, dropout)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "dropout"),
    [*((shape, 0.3) for shape in MESHES), ("fsdp 2 × expert 2 × tensor 2", 0.0)],
)
def test_losses_and_gradients_on_a_mesh_are_those_of_a_single_device(shape, dropout, directory, single):
    expected_loss, expected = single(dropout)
    mesh = make_mesh(MESHES[shape])
    with jax.set_mesh(mesh):
        loss, gradients = loss_and_gradients(directory, mesh, dropout)
    assert float(loss) == pytest.approx(float(expected_loss), rel=1e-6)
    jax.tree.map_with_path(
        lambda path, actual, wanted: assert_within(1e-5, actual, wanted, jax.tree_util.keystr(path)),
        gradients,
        expected,
    )


def test_a_batch_that_does_not_split_over_the_mesh_is_refused(loaded):
    model, params = loaded
    with jax.set_mesh(make_mesh(MeshShape(fsdp=8))), pytest.raises(ValueError, match="evenly divisible"):
        apply(model, params, TOKENS[:3])


# The mixture alone, against every token's own dense product

B, T, D, F, E, K, R = 8, 3, 8, 16, 4, 2, 2
SHAPES = {"gate": (D, F), "up": (D, F), "down": (F, D)}
LOADS = {
    "even": np.stack([np.arange(B * T) % E, np.arange(B * T) // E % (E - 1)], -1),
    "all on two experts": np.tile([2, 0], (B * T, 1)),
    "one expert idle": np.stack([np.arange(B * T) % 2, np.full(B * T, 3)], -1),
}
LOADS["even"][:, 1] += LOADS["even"][:, 1] >= LOADS["even"][:, 0]


def operands(load):
    """x, the tokens' experts and shares, the weights, and an adapter with dropout on each of them."""
    draw = np.random.default_rng(2)

    def array(*shape):
        return jnp.asarray(draw.normal(size=shape), jnp.float32)

    shares = jax.nn.softmax(array(B, T, K))
    weights = {name: array(E, *shape) / 4 for name, shape in SHAPES.items()}
    adapters = {
        name: [LowRank(array(E, i, R), array(E, R, o) / 4, jnp.asarray(draw.random((B, T, K, i)) < 0.7))]
        for name, (i, o) in SHAPES.items()
    }
    return array(B, T, D), jnp.asarray(LOADS[load].reshape(B, T, K)), shares, weights, adapters


def mixture(x, chosen, shares, weights, factors, masks):
    adapters = {name: [LowRank(a, b, masks[name])] for name, (a, b) in factors.items()}
    return mix_experts(x, Routing(shares, chosen, shares), weights, adapters)


def dense_mixture(x, chosen, shares, weights, factors, masks):
    """The same with a copy of its matrices for each token."""

    def project(rows, name):
        a, b = factors[name]
        y = jnp.einsum("BTki,BTkio->BTko", rows, weights[name][chosen])
        return y + jnp.einsum("BTki,BTkir,BTkro->BTko", rows * masks[name], a[chosen], b[chosen])

    rows = jnp.broadcast_to(x[:, :, None], (B, T, K, D))
    hidden = jax.nn.silu(project(rows, "gate")) * project(rows, "up")
    return (project(hidden, "down") * shares[..., None]).sum(2)


def values_and_gradients(function, operands):
    """What `function` makes of the operands, and the gradients of a function of it with respect to all but integers."""
    x, chosen, shares, weights, adapters = operands
    factors = {name: (adapter.a, adapter.b) for name, [adapter] in adapters.items()}
    masks = {name: adapter.keep for name, [adapter] in adapters.items()}

    def loss(x, shares, weights, factors):
        y = function(x, chosen, shares, weights, factors, masks)
        return jnp.sin(y).sum(), y

    gradients, y = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3), has_aux=True))(x, shares, weights, factors)
    return y, gradients


def assert_equals_dense(load, mesh_shape=None):
    inputs = operands(load)
    expected = values_and_gradients(dense_mixture, inputs)
    with contextlib.nullcontext() if mesh_shape is None else jax.set_mesh(make_mesh(mesh_shape)):
        actual = values_and_gradients(mixture, inputs)
    jax.tree.map(functools.partial(assert_within, 1e-5), actual, expected)


@pytest.mark.parametrize("load", LOADS)
def test_nothing_is_dropped_however_uneven_the_load(load):
    assert_equals_dense(load)


@pytest.mark.parametrize("load", LOADS)
def test_nothing_is_dropped_where_experts_lie_on_several_devices(load):
    assert_equals_dense(load, MESHES["expert 4 × tensor 2"])


def test_routing_is_float32_however_narrow_x_is():
    draw = np.random.default_rng(4)
    x, router = draw.normal(size=(2, 3, 64)), draw.normal(size=(64, E))
    narrow = jnp.asarray(x, jnp.bfloat16)
    routing = jax.jit(route, static_argnums=2)(narrow, jnp.asarray(router, jnp.float32), K)
    logits = np.asarray(narrow, np.float64) @ np.asarray(router, np.float32)
    exact = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    np.testing.assert_allclose(routing.probabilities, exact, rtol=2e-5)
    np.testing.assert_array_equal(routing.chosen, np.argsort(-exact)[..., :K])
    np.testing.assert_allclose(routing.weights.sum(-1), 1, rtol=1e-6)
    assert routing.weights.dtype == jnp.float32


# The kernels that a TPU runs, interpreted


@pytest.fixture
def on_tpu(monkeypatch):
    interpret_tpu_kernels(monkeypatch)


@pytest.mark.parametrize(
    ("sizes", "dtype"),
    [
        ([5, 0, 21, 3], jnp.float32),
        ([5, 0, 21, 3], jnp.bfloat16),
        ([0, 0, 40, 0], jnp.float32),
        ([0, 0, 0, 0], jnp.float32),
    ],
    ids=str,
)
def test_the_tpu_kernels_equal_xlas_and_ignore_rows_of_no_group(sizes, dtype):
    draw = np.random.default_rng(5)
    x, y = (jnp.asarray(draw.normal(size=(40, width)), dtype) for width in (24, 48))
    w = jnp.asarray(draw.normal(size=(4, 24, 48)), dtype)
    sizes, used = jnp.asarray(sizes, jnp.int32), sum(sizes)
    product, vjp = jax.vjp(lambda x, w: jax.lax.ragged_dot(x, w, sizes), x, w)
    x_grad, w_grad = vjp(y * (np.arange(40) < used)[:, None])
    x, y = x.at[used:].set(jnp.nan), y.at[used:].set(jnp.nan)

    share = 1e-6 if dtype == jnp.float32 else 2**-8
    actual = moe.tpu_product(x, w, sizes, transposed=False, interpret=True)
    assert_within(share, actual[:used], product[:used])
    assert_within(share, moe.tpu_product(y, w, sizes, transposed=True, interpret=True)[:used], x_grad[:used])
    assert_within(share, moe.tpu_outer(x, y, sizes, dtype, interpret=True), w_grad)


def test_the_mixture_that_a_tpu_computes_equals_the_dense_one(on_tpu):
    assert_equals_dense("one expert idle")


def test_a_tpus_experts_ignore_the_rows_of_other_devices(on_tpu):
    assert_equals_dense("all on two experts", MESHES["expert 4 × tensor 2"])


def test_the_platform_compiled_for_decides_and_not_the_one_that_compiles():
    x, w, sizes = jnp.ones((16, 8)), jnp.ones((2, 8, 8)), jnp.array([4, 12], jnp.int32)
    trace = jax.jit(jax.grad(lambda x, w: moe.grouped_product(x, w, sizes).sum(), argnums=(0, 1))).trace(x, w)
    assert "tpu_custom_call" in trace.lower(lowering_platforms=("tpu",)).as_text()
    assert "tpu_custom_call" not in trace.lower(lowering_platforms=("cpu",)).as_text()
