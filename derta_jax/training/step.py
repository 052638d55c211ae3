"""The train step: micro-batch gradients as one global sum, one division, one update."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from derta_jax.models.config import ModelConfig
from derta_jax.models.sharding import constrain_like_params, param_shardings, partition_spec
from derta_jax.objectives.derta import Loss


class TrainState(NamedTuple):
    """`step` counts finished updates; `params` are the float32 masters."""

    step: Any
    params: Any
    opt_state: Any


def state_shardings(config: ModelConfig, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Adam's moments lie where their parameters lie; scalars are replicated."""
    params = param_shardings(config, mesh)
    replicated = NamedSharding(mesh, PartitionSpec())
    shapes = jax.tree.map(lambda _: jax.ShapeDtypeStruct((), jnp.float32), params)
    opt_state = optax.tree_utils.tree_map_params(
        optimizer,
        lambda _, sharding: sharding,
        jax.eval_shape(optimizer.init, shapes),
        params,
        transform_non_params=lambda _: replicated,
    )
    return TrainState(replicated, params, opt_state)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Of batch arrays [accumulation, S, T]: sequences over data and fsdp."""
    return NamedSharding(mesh, partition_spec((None, "batch", "sequence")))


def init_state(params: Any, optimizer: optax.GradientTransformation, shardings: TrainState) -> TrainState:
    """A state at step 0 from (sharded) parameters, which it takes over."""

    def init(params: Any) -> TrainState:
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))

    return jax.jit(init, out_shardings=shardings, donate_argnums=0)(params)


def accumulate(
    loss: Loss, config: ModelConfig, params: Any, batch: dict[str, jax.Array], mean_of_means: bool = False
) -> tuple[Any, dict[str, jax.Array]]:
    """Gradients of the mean loss over all micro-batches of `batch` [accumulation, S, T], and the summed metrics.

    Sums of all labelled tokens are divided once; with `mean_of_means` each micro-batch's mean counts the same instead,
    as gradient accumulation does in the authors' code.
    """
    micro_batches = next(iter(batch.values())).shape[0]

    def scaled_loss(params: Any, micro: dict[str, jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
        loss_sum, weight_sum, metrics = loss(params, micro)
        if mean_of_means:
            loss_sum, weight_sum = loss_sum / weight_sum / micro_batches, jnp.float32(1 / micro_batches)
        return loss_sum, metrics | {"loss_sum": loss_sum, "weight_sum": weight_sum}

    def one_micro_batch(totals: Any, micro: dict[str, jax.Array]) -> tuple[Any, None]:
        grads, metrics = jax.grad(scaled_loss, has_aux=True)(params, micro)
        grads = constrain_like_params(config, grads)
        return jax.tree.map(jnp.add, totals, (grads, metrics)), None

    shapes = jax.eval_shape(jax.grad(scaled_loss, has_aux=True), params, jax.tree.map(lambda x: x[0], batch))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    (grads, metrics), _ = jax.lax.scan(one_micro_batch, zeros, batch)
    return jax.tree.map(lambda grad: grad / metrics["weight_sum"], grads), metrics


def make_train_step(
    loss: Loss,
    config: ModelConfig,
    optimizer: optax.GradientTransformation,
    shardings: TrainState,
    mean_of_means: bool = False,
) -> Callable[[TrainState, dict[str, jax.Array]], tuple[TrainState, dict[str, jax.Array]]]:
    """`step(state, batch) → (state, metrics)`, jitted, the old state donated.

    Metrics are those of the loss as sums over the batch, with `loss_sum`, `weight_sum` and `grad_norm` (before
    clipping); all belong to the parameters before the update.
    """

    def step(state: TrainState, batch: dict[str, jax.Array]) -> tuple[TrainState, dict[str, jax.Array]]:
        grads, metrics = accumulate(loss, config, state.params, batch, mean_of_means)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return TrainState(state.step + 1, params, opt_state), metrics | {"grad_norm": optax.tree.norm(grads)}

    replicated = shardings.step
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, replicated))
