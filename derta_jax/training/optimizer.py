"""AdamW with warm-up, a schedule and clipping, as the config says."""

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
    """Weight decay reaches all parameters, as in the authors' runs."""
    adamw = optax.adamw(
        learning_rate_schedule(train, steps), train.b1, train.b2, train.eps, weight_decay=train.weight_decay
    )
    return adamw if train.clip is None else optax.chain(optax.clip_by_global_norm(train.clip), adamw)
