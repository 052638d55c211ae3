"""AdamW with warm-up, a schedule and clipping, as the config says."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from derta_jax.config import Train


def learning_rate_schedule(train: Train, steps: int) -> optax.Schedule:
    """Learning rate by step, counted from 0: linear warm-up from 0, then cosine or linear to 0, or constant."""
    warmup = round(train.warmup * steps)
    peak, rest = train.learning_rate, max(1, steps - warmup)
    after = {
        "cosine": lambda: optax.cosine_decay_schedule(peak, rest),
        "linear": lambda: optax.linear_schedule(peak, 0.0, rest),
        "constant": lambda: optax.constant_schedule(peak),
    }[train.schedule]()
    if warmup == 0:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup])


def make_optimizer(train: Train, steps: int) -> optax.GradientTransformation:
    """AdamW whose moments are stored in `train.optimizer_dtype`. Weight decay reaches all parameters, as in the
    authors' runs.
    """
    adam = optax.scale_by_adam(train.b1, train.b2, train.eps)
    if train.optimizer_dtype == "bfloat16":
        adam = in_bfloat16(adam)
    adamw = optax.chain(
        adam,
        optax.add_decayed_weights(train.weight_decay),
        optax.scale_by_learning_rate(learning_rate_schedule(train, steps)),
    )
    return adamw if train.clip is None else optax.chain(optax.clip_by_global_norm(train.clip), adamw)


def in_bfloat16(adam: optax.GradientTransformation) -> optax.GradientTransformation:
    """`optax.scale_by_adam` that computes in float32 and stores both moments in bfloat16: 4 bytes a parameter, not 8.

    A bfloat16 has 8 significant bits, so that the nearest one swallows changes below 1/512. The first moment changes
    by a tenth in a step and is rounded to the nearest. The second changes by 1 - b2, a thousandth: rounded so, it would
    never fall, and rise only at gradients of twice their usual size. It is rounded up or down at random instead, by
    how near either is, which is right in the mean; the draw is a function of the step and the entry's place, so that a
    resumed run and another mesh round alike.
    """

    def init(params: Any) -> Any:
        state = adam.init(params)
        return state._replace(mu=optax.tree.cast(state.mu, jnp.bfloat16), nu=optax.tree.cast(state.nu, jnp.bfloat16))

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        wide = state._replace(mu=optax.tree.cast(state.mu, jnp.float32), nu=optax.tree.cast(state.nu, jnp.float32))
        updates, new = adam.update(grads, wide, params)
        keys = optax.tree.split_key_like(jax.random.fold_in(jax.random.key(0), state.count), new.nu)
        nu = jax.tree.map(round_at_random, new.nu, keys)
        return updates, new._replace(mu=optax.tree.cast(new.mu, jnp.bfloat16), nu=nu)

    return optax.GradientTransformation(init, update)


def round_at_random(x: jax.Array, key: jax.Array) -> jax.Array:
    """Float32 x ≥ 0 to one of the two nearest bfloat16, whose expectation is x."""
    noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + noise
    return jax.lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)
