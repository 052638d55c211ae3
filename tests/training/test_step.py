"""The train step: updates, steps that are skipped, votes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from derta_jax.config import MeshShape, Train
from derta_jax.objectives.objective import Mean
from derta_jax.training.mesh import make_mesh
from derta_jax.training.optimizer import make_optimizer
from derta_jax.training.step import (
    GO_ON,
    SAVE,
    STOP,
    cast_votes,
    finished_updates,
    init_state,
    make_train_step,
    state_shardings,
    to_devices,
)


def squares(variables, micro, key, step):
    """A loss of one weight vector; `scale` in the batch can make it infinite."""
    loss = jnp.sum((variables["params"]["w"] - 1.0) ** 2) * micro["scale"].sum()
    return loss, jnp.float32(micro["scale"].size), {"loss_mle": Mean(loss, jnp.float32(1))}


@pytest.fixture(scope="module")
def trainer():
    """(mesh, a fresh state, step): eight weights over eight devices."""
    mesh = make_mesh(MeshShape())
    optimizer = make_optimizer(Train(output="nowhere", steps=10, learning_rate=0.1, warmup=0.0), 10)
    placed = NamedSharding(mesh, PartitionSpec("fsdp"))
    shardings = state_shardings({"params": {"w": placed}}, optimizer, mesh)

    def fresh():
        return init_state({"params": {"w": jax.device_put(jnp.zeros(8), placed)}}, optimizer, shardings)

    return mesh, fresh, make_train_step(squares, optimizer, optax.constant_schedule(0.1), shardings, seed=0)


def batch_of(scale, mesh):
    return to_devices({"scale": np.full((1, 8, 1), scale, np.float32)}, mesh)


@pytest.mark.parametrize("bad", [np.inf, np.nan, 1e38])
def test_a_step_without_a_finite_loss_and_gradient_changes_nothing_and_counts(trainer, bad):
    mesh, fresh, step = trainer
    votes = cast_votes(GO_ON, mesh)
    state, first = step(fresh(), {}, batch_of(1.0, mesh), votes)
    before = jax.device_get(state)
    state, second = step(state, {}, batch_of(bad, mesh), votes)
    assert [bool(metrics["skipped"]) for metrics in (first, second)] == [False, True]
    assert int(state.step) == 2
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state[1:]), before[1:])


def test_after_a_skipped_step_training_goes_on_as_if_it_had_not_been(trainer):
    mesh, fresh, step = trainer
    votes = cast_votes(GO_ON, mesh)
    plain, skipping = fresh(), fresh()
    for scale in (1.0, 2.0):
        plain, _ = step(plain, {}, batch_of(scale, mesh), votes)
    for scale in (1.0, np.nan, 2.0):
        skipping, metrics = step(skipping, {}, batch_of(scale, mesh), votes)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(skipping[1:]), jax.device_get(plain[1:]))
    assert int(finished_updates(skipping.opt_state)) == 2
    assert int(metrics["updates"]) == 1


def test_one_device_that_votes_decides_for_all(trainer):
    mesh, fresh, step = trainer
    sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    for vote in (GO_ON, SAVE, STOP):
        votes = jax.device_put(jnp.zeros(8, jnp.int32).at[5].set(vote), sharding)
        assert int(step(fresh(), {}, batch_of(1.0, mesh), votes)[1]["verdict"]) == vote


def test_the_count_of_updates_is_the_optimizers(trainer):
    _, fresh, _ = trainer
    assert int(finished_updates(fresh().opt_state)) == 0
    assert optax.tree_utils.tree_get_all_with_path(fresh().opt_state, "count")
