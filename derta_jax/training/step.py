"""The train step: micro-batch gradients as one global sum, one division, one update."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from derta_jax.models.lora import joined
from derta_jax.models.sharding import partition_spec
from derta_jax.objectives.objective import Loss
from derta_jax.training.compiler import Options

GO_ON, SAVE, STOP = 0, 1, 2
"""What a process may vote for; the highest vote of a step holds for all."""


class TrainState(NamedTuple):
    """`step` counts finished steps, skipped ones included; `trainable` are the float32 variables that the optimizer
    updates, by collection: `params`, or `lora` where only adapters are trained.
    """

    step: Any
    trainable: Any
    opt_state: Any


def state_shardings(trainable: Any, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Of a state whose variables have the shardings `trainable`: Adam's moments lie where their parameters lie."""
    replicated = NamedSharding(mesh, PartitionSpec())
    shapes = jax.tree.map(lambda _: jax.ShapeDtypeStruct((), jnp.float32), trainable)
    opt_state = optax.tree_utils.tree_map_params(
        optimizer,
        lambda _, sharding: sharding,
        jax.eval_shape(optimizer.init, shapes),
        trainable,
        transform_non_params=lambda _: replicated,
    )
    return TrainState(replicated, trainable, opt_state)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Of batch arrays [accumulation, S, T]: sequences over data and fsdp."""
    return NamedSharding(mesh, partition_spec((None, "batch", "sequence")))


def to_devices(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Batch arrays as the train step takes them; each process hands over the part that its own devices hold."""
    sharding = batch_sharding(mesh)
    return {
        name: jax.make_array_from_callback(array.shape, sharding, array.__getitem__) for name, array in batch.items()
    }


def init_state(trainable: Any, optimizer: optax.GradientTransformation, shardings: TrainState) -> TrainState:
    """A state at step 0 from (sharded) variables, which it takes over."""

    def init(trainable: Any) -> TrainState:
        return TrainState(jnp.zeros((), jnp.int32), trainable, optimizer.init(trainable))

    return jax.jit(init, out_shardings=shardings, donate_argnums=0)(trainable)


def accumulate(
    loss: Loss,
    trainable: Any,
    frozen: Any,
    batch: dict[str, jax.Array],
    key: jax.Array,
    mean_of_means: bool = False,
    shardings: Any = None,
    step: jax.Array | int = 0,
    always_add: bool = True,
) -> tuple[Any, dict[str, jax.Array]]:
    """Gradients of the mean loss over all micro-batches of `batch` [accumulation, S, T], and the summed metrics.

    Gradients are those of the `trainable` collections alone; `key` is that of this step's dropout, and `step` that of
    the loss's coefficients. Sums of all labelled tokens are divided once; with `mean_of_means` each micro-batch's mean
    counts the same instead, as gradient accumulation does in the authors' code. Gradients are held in `shardings` where
    given. With `always_add` those of a single micro-batch are added to zeros, too, of which XLA:TPU makes a faster
    program; elsewhere that is a pass over memory more.
    """
    micro_batches = next(iter(batch.values())).shape[0]

    def scaled_loss(trainable: Any, micro: dict[str, jax.Array], key: jax.Array) -> tuple[jax.Array, Any]:
        loss_sum, weight_sum, metrics = loss(joined(frozen, trainable), micro, key, step)
        if mean_of_means:
            loss_sum, weight_sum = loss_sum / weight_sum / micro_batches, jnp.float32(1 / micro_batches)
        return loss_sum, metrics | {"loss_sum": loss_sum, "weight_sum": weight_sum}

    def one_micro_batch(totals: Any, numbered: tuple[jax.Array, dict[str, jax.Array]]) -> tuple[Any, None]:
        number, micro = numbered
        loss_of = functools.partial(scaled_loss, micro=micro, key=jax.random.fold_in(key, number))
        backward: Any
        loss_sum, backward, metrics = jax.vjp(loss_of, trainable, has_aux=True)
        grads = jax.tree.map(jax.new_ref, totals[0])
        # each layer's gradient is added where its sum lies, so that a micro-batch's own never exist as a whole
        backward.with_refs(grads)(jnp.ones_like(loss_sum))
        return (jax.tree.map(jax.freeze, grads), jax.tree.map(jnp.add, totals[1], metrics)), None

    first = jax.tree.map(lambda x: x[0], batch)
    if micro_batches == 1 and not always_add:
        loss_of = functools.partial(scaled_loss, micro=first, key=jax.random.fold_in(key, 0))
        grads, metrics = jax.grad(loss_of, has_aux=True)(trainable)
        if shardings is not None:
            grads = jax.lax.with_sharding_constraint(grads, shardings)
        return jax.tree.map(lambda grad: grad / metrics["weight_sum"], grads), metrics
    _, shapes = jax.eval_shape(scaled_loss, trainable, first, key)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), (trainable, shapes))
    if shardings is not None:
        zeros = (jax.lax.with_sharding_constraint(zeros[0], shardings), zeros[1])
    (grads, metrics), _ = jax.lax.scan(one_micro_batch, zeros, (jnp.arange(micro_batches), batch))
    return jax.tree.map(lambda grad: grad / metrics["weight_sum"], grads), metrics


def make_train_step(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    shardings: TrainState,
    seed: int,
    mean_of_means: bool = False,
    always_add: bool = True,
    compiler_options: Options | None = None,
) -> Callable[[TrainState, Any, dict[str, jax.Array], jax.Array], tuple[TrainState, dict[str, jax.Array]]]:
    """`step(state, frozen, batch, votes) → (state, metrics)`, jitted, the old state donated.

    `frozen` are the collections that no gradient is computed for. Metrics are those of the loss as sums over the batch,
    with `loss_sum`, `weight_sum` and `grad_norm` (before clipping); all belong to the variables before the update.
    `verdict` is the highest of the `votes`, one int32 a device: what any process wants, known to all at the same step.

    Where loss or gradient is not finite the variables stay what they were, `skipped` is true, and the step counts.
    `updates` are those before this step, and `learning_rate` is their `schedule`'s. Dropout is a function of (seed,
    step, micro-batch).
    """

    def step(
        state: TrainState, frozen: Any, batch: dict[str, jax.Array], votes: jax.Array
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        grads, metrics = accumulate(
            loss, state.trainable, frozen, batch, key, mean_of_means, shardings.trainable, state.step, always_add
        )
        grad_norm = optax.tree.norm(grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.trainable)
        trainable = optax.apply_updates(state.trainable, updates)
        finite = jnp.isfinite(metrics["loss_sum"]) & jnp.isfinite(grad_norm)
        trainable, opt_state = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old), (trainable, opt_state), (state.trainable, state.opt_state)
        )
        count = finished_updates(state.opt_state)
        metrics |= {
            "grad_norm": grad_norm,
            "skipped": ~finite,
            "updates": count,
            "learning_rate": schedule(count),
            "verdict": votes.max(),
        }
        return TrainState(state.step + 1, trainable, opt_state), metrics

    replicated = shardings.step
    return jax.jit(
        step, donate_argnums=0, out_shardings=(shardings, replicated), compiler_options=compiler_options or {}
    )


def finished_updates(opt_state: Any) -> jax.Array:
    """How many updates an optimizer has made: its own count, which skipped steps do not raise."""
    return optax.tree_utils.tree_get_all_with_path(opt_state, "count")[0][1]


def cast_votes(vote: int, mesh: Mesh) -> jax.Array:
    """This process's vote on each of its devices, int32 [devices]."""
    return jax.make_array_from_callback((mesh.size,), vote_sharding(mesh), lambda index: np.full((1,), vote, np.int32))


def vote_sharding(mesh: Mesh) -> NamedSharding:
    """Of votes: one on each device."""
    return NamedSharding(mesh, PartitionSpec(mesh.axis_names))
