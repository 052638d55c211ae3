"""The vocabulary-parallel loss against one line of softmax, on meshes over which the vocabulary splits and does not."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from derta_jax.config import MeshShape
from derta_jax.models.sharding import partition_spec
from derta_jax.objectives.token_loss import (
    divergence,
    labelled_cross_entropy,
    labelled_loss,
    labelled_nll,
    next_tokens,
    reverse_divergence,
)
from derta_jax.planning.hlo_cost import program_cost
from derta_jax.planning.slices import find_slice
from derta_jax.training.compiler import compiler_options
from derta_jax.training.mesh import make_mesh

S, T, D = 8, 6, 5
MESHES = {
    "one device": MeshShape(fsdp=1),
    "fsdp 8": MeshShape(fsdp=8),
    "data 2 × fsdp 2 × tensor 2": MeshShape(data=2, fsdp=2, tensor=2),
}
COEFFICIENTS: Any = np.array([1.0, 0.5], np.float32)


@pytest.fixture(params=["vocabulary first, as on a CPU", "vocabulary last, as elsewhere"])
def layout(request, monkeypatch):
    if request.param.startswith("vocabulary last"):
        monkeypatch.setattr(jax.lax, "platform_dependent", lambda *operands, cpu, default: default(*operands))


def mesh_of(shape: MeshShape):
    return make_mesh(shape, jax.devices()[: shape.data * shape.fsdp * shape.tensor])


def arrays(vocabulary: int):
    draw = np.random.default_rng(0)
    hidden, head = draw.normal(size=(S, T, D)), draw.normal(size=(D, vocabulary))
    labels = draw.integers(0, vocabulary, (S, T))
    kinds = draw.integers(0, 2, (S, T, 1)) * np.eye(2)[draw.integers(0, 2, (S, T))]
    return jnp.float32(hidden), jnp.float32(head), jnp.int32(labels), jnp.float32(kinds)


def plainly(hidden, head, labels, kinds):
    logs = jax.nn.log_softmax(hidden @ head)
    return -jnp.einsum("STV,STV,STW->W", logs, jax.nn.one_hot(labels, head.shape[1]), kinds)


def loss_of(hidden, head, labels, kinds, *, chunk=2048):
    return labelled_cross_entropy(hidden, head, labels, kinds, COEFFICIENTS, chunk=chunk)[0]


@pytest.mark.usefixtures("layout")
@pytest.mark.parametrize("vocabulary", [32, 30, 27], ids=["splits", "splits over tensor alone", "does not split"])
@pytest.mark.parametrize("mesh", MESHES.values(), ids=list(MESHES))
@pytest.mark.parametrize("selected", [False, True], ids=["all positions", "labelled ones"])
def test_loss_sums_and_gradients_are_those_of_a_plain_softmax(vocabulary, mesh, selected):
    hidden, head, labels, kinds = arrays(vocabulary)
    mesh = mesh_of(mesh)
    devices = mesh.size // mesh.shape["tensor"]
    labelled = np.asarray(kinds).any(-1).reshape(devices, -1).sum(1)
    capacity = int(labelled.max()) if selected else None

    def ours(hidden, head):
        loss, sums = labelled_cross_entropy(hidden, head, labels, kinds, COEFFICIENTS, capacity, chunk=4)
        return loss / 3, sums

    def expected(hidden, head):
        sums = plainly(hidden, head, labels, kinds)
        return sums @ COEFFICIENTS / 3, sums

    with jax.set_mesh(mesh):
        value = jax.jit(ours)(hidden, head)
        found = jax.jit(jax.value_and_grad(ours, (0, 1), has_aux=True))(hidden, head)
    of_plain = jax.value_and_grad(expected, (0, 1), has_aux=True)(hidden, head)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), found, of_plain)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), value, of_plain[0])


@pytest.mark.parametrize("vocabulary", [32, 27], ids=["splits", "does not split"])
@pytest.mark.parametrize("mesh", MESHES.values(), ids=list(MESHES))
@pytest.mark.parametrize("selected", [False, True], ids=["all positions", "labelled ones"])
def test_the_loss_of_each_position_is_that_of_a_plain_softmax(vocabulary, mesh, selected):
    hidden, head, labels, kinds = arrays(vocabulary)
    labelled = kinds.any(-1)
    mesh = mesh_of(mesh)
    devices = mesh.size // mesh.shape["tensor"]
    capacity = int(labelled.reshape(devices, -1).sum(1).max()) if selected else None
    expected = -jnp.take_along_axis(jax.nn.log_softmax(hidden @ head), labels[..., None], -1)[..., 0] * labelled
    with jax.set_mesh(mesh):
        found = jax.jit(lambda hidden, head: labelled_nll(hidden, head, labels, labelled, capacity, chunk=4))(
            hidden, head
        )
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("layout")
@pytest.mark.parametrize("measure", [divergence, reverse_divergence])
@pytest.mark.parametrize("mesh", MESHES.values(), ids=list(MESHES))
def test_a_divergence_and_its_gradients_are_those_of_the_whole_distributions(measure, mesh):
    hidden, head, _, kinds = arrays(32)
    reference = jnp.float32(np.random.default_rng(1).normal(size=hidden.shape))
    mesh = mesh_of(mesh)

    def plain(hidden, head):
        ours, theirs = jax.nn.log_softmax(hidden @ head), jax.nn.log_softmax(reference @ jax.lax.stop_gradient(head))
        above, below = (theirs, ours) if measure is divergence else (ours, theirs)
        return jnp.einsum("STV,STW,W->", jnp.exp(above) * (above - below), kinds, COEFFICIENTS)

    def ours(hidden, head):
        return labelled_loss(measure, hidden, head, reference, kinds, COEFFICIENTS, chunk=4)[0]

    expected = jax.value_and_grad(plain, (0, 1))(hidden, head)
    with jax.set_mesh(mesh):
        found = jax.jit(jax.value_and_grad(ours, (0, 1)))(hidden, head)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), found, expected)


@pytest.mark.usefixtures("layout")
def test_a_head_that_is_a_transposed_embedding_gets_its_gradient():
    hidden, head, labels, kinds = arrays(32)

    def loss(embedding, of):
        return of(hidden, embedding.T)

    ours = jax.grad(loss)(head.T, lambda hidden, head: loss_of(hidden, head, labels, kinds))
    expected = jax.grad(loss)(head.T, lambda hidden, head: plainly(hidden, head, labels, kinds) @ COEFFICIENTS)
    np.testing.assert_allclose(ours, expected, rtol=2e-5, atol=2e-5)


def test_the_sums_have_no_gradient():
    hidden, head, labels, kinds = arrays(32)

    def sums_of(hidden, head):
        return labelled_cross_entropy(hidden, head, labels, kinds, COEFFICIENTS)[1].sum()

    for grad in jax.grad(sums_of, (0, 1))(hidden, head):
        np.testing.assert_array_equal(grad, jnp.zeros_like(grad))


@pytest.mark.usefixtures("layout")
@pytest.mark.parametrize("head_dtype", [jnp.float32, jnp.bfloat16])
def test_gradients_have_the_dtypes_of_what_they_are_of_and_the_heads_is_added_up_in_float32(head_dtype):
    hidden, head, labels, kinds = arrays(32)
    # every token adds the same to a column of the head's gradient: rounded to eight bits, the sum would come to a halt
    hidden = jnp.ones_like(hidden, jnp.bfloat16, shape=(S, 512, D))
    labels, kinds = jnp.zeros((S, 512), jnp.int32), jnp.ones((S, 512, 2))
    gradients = jax.grad(lambda hidden, head: loss_of(hidden, head, labels, kinds, chunk=1), (0, 1))
    by_hidden, by_head = gradients(hidden, jnp.zeros_like(head, head_dtype))
    assert (by_hidden.dtype, by_head.dtype) == (jnp.bfloat16, head_dtype)
    expected = S * 512 * 1.5 * (1 / 32 - (np.arange(32) == 0))
    np.testing.assert_allclose(np.float32(by_head), np.broadcast_to(expected, by_head.shape), rtol=2**-8)


WIDTH, VOCABULARY, LENGTH, CHUNK = 256, 512, 64, 16


@pytest.mark.usefixtures("layout")
@pytest.mark.parametrize(
    ("of", "products"), [((), 1), ((0,), 2), ((0, 1), 3)], ids=["no gradient", "a frozen head", "all gradients"]
)
def test_a_chunk_costs_the_products_that_are_asked_for(of, products):
    """By XLA's own count, which takes the body of a loop once."""
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((1, LENGTH, WIDTH), (WIDTH, VOCABULARY))]
    labels, kinds = jnp.zeros((1, LENGTH), jnp.int32), jnp.ones((1, LENGTH, 2))

    def loss(hidden, head):
        return loss_of(hidden, head, labels, kinds, chunk=CHUNK)

    counted = jax.jit(jax.value_and_grad(loss, of) if of else loss).lower(*shapes).compile().cost_analysis() or {}
    assert counted["flops"] == pytest.approx(products * 2 * CHUNK * WIDTH * VOCABULARY, rel=0.1)


@pytest.mark.parametrize("place", ["v5e-16", "v5p-128"], ids=["two rings", "three rings"])
def test_hidden_states_travel_once_and_their_gradients_in_the_compute_dtype(place, tpu_compiler):
    """In a program for a TPU."""
    mesh = make_mesh(MeshShape(), find_slice(place).devices())

    def array(dtype, *shape, axes):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, partition_spec(axes)))

    rows, length, width = mesh.size, 256, 1024
    hidden = array(jnp.bfloat16, rows, length, width, axes=("batch",))
    head = array(jnp.float32, width, 16384, axes=("embed", "vocab"))
    labels = array(jnp.int32, rows, length, axes=("batch",))
    kinds = array(jnp.float32, rows, length, 2, axes=("batch",))

    placed = (hidden.sharding, head.sharding)
    gradients = jax.jit(
        jax.grad(functools.partial(loss_of, chunk=128), (0, 1)),
        out_shardings=placed,
        compiler_options=compiler_options(mesh),
    )
    with jax.set_mesh(mesh):
        compiled = gradients.lower(hidden, head, labels, kinds).compile()
    moved = program_cost(compiled.as_text() or "").collective_bytes
    once = rows * length * width * 2
    assert moved["all-gather"] == pytest.approx(once, rel=0.03)
    assert moved["all-reduce"] + moved.get("reduce-scatter", 0) == pytest.approx(once, rel=0.03)


def test_next_tokens_shifts_by_one_and_leaves_the_last_place_empty():
    np.testing.assert_array_equal(next_tokens(jnp.array([[1, 2, 3]])), [[2, 3, 0]])
    assert next_tokens(jnp.ones((2, 3, 4))).shape == (2, 3, 4)
