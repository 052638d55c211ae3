"""The vocabulary-parallel loss against one line of softmax, on meshes over which the vocabulary splits and does not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from derta_jax.config import MeshShape
from derta_jax.objectives.token_loss import labelled_cross_entropy, next_tokens
from derta_jax.training.mesh import make_mesh

S, T, D = 8, 6, 5
MESHES = {"fsdp 8": MeshShape(), "data 2 × fsdp 2 × tensor 2": MeshShape(data=2, fsdp=2, tensor=2)}


def arrays(vocabulary: int):
    draw = np.random.default_rng(0)
    hidden, head = draw.normal(size=(S, T, D)), draw.normal(size=(D, vocabulary))
    labels = draw.integers(0, vocabulary, (S, T))
    kinds = draw.integers(0, 2, (S, T, 1)) * np.eye(2)[draw.integers(0, 2, (S, T))]
    return jnp.float32(hidden), jnp.float32(head), jnp.int32(labels), jnp.float32(kinds)


def plainly(hidden, head, labels, kinds):
    logs = jax.nn.log_softmax(hidden @ head)
    return -jnp.einsum("STV,STV,STW->W", logs, jax.nn.one_hot(labels, head.shape[1]), kinds)


@pytest.mark.parametrize("vocabulary", [32, 30, 27], ids=["splits", "splits over tensor alone", "does not split"])
@pytest.mark.parametrize("mesh", MESHES.values(), ids=list(MESHES))
@pytest.mark.parametrize("selected", [False, True], ids=["all positions", "labelled ones"])
def test_sums_and_gradients_are_those_of_a_plain_softmax(vocabulary, mesh, selected):
    hidden, head, labels, kinds = arrays(vocabulary)
    mesh = make_mesh(mesh)
    devices = mesh.size // mesh.shape["tensor"]
    labelled = np.asarray(kinds).any(-1).reshape(devices, -1).sum(1)
    capacity = int(labelled.max()) if selected else None

    def ours(hidden, head):
        return labelled_cross_entropy(hidden, head, labels, kinds, capacity, chunk=4) @ jnp.array([1.0, 0.5])

    expected = jax.value_and_grad(lambda *of: plainly(of[0], of[1], labels, kinds) @ jnp.array([1.0, 0.5]), (0, 1))
    with jax.set_mesh(mesh):
        found = jax.jit(jax.value_and_grad(ours, (0, 1)))(hidden, head)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), found, expected(hidden, head))


def test_next_tokens_shifts_by_one_and_leaves_the_last_place_empty():
    np.testing.assert_array_equal(next_tokens(jnp.array([[1, 2, 3]])), [[2, 3, 0]])
    assert next_tokens(jnp.ones((2, 3, 4))).shape == (2, 3, 4)
