"""How much of harmful answers the security vectors absorb: by gradients, and by losses with the vectors on and off."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from derta_jax.data.loader import Batches
from derta_jax.models.lora import joined, switched
from derta_jax.objectives.objective import Loss
from derta_jax.objectives.view import View
from derta_jax.training.run import Run
from derta_jax.training.step import accumulate, to_devices

BATCHES = 16
"""Of the vectors' data that losses are means of, at most."""


def answer_loss(run: Run, samples: Batches, stream: str) -> Loss:
    """Cross-entropy of the answers of one stream of `samples`, which are laid out for the run's mesh."""
    place = samples.objective.streams.index(stream)

    def loss(
        variables: Any, micro: dict[str, jax.Array], key: Any = None, step: Any = 0
    ) -> tuple[Any, Any, dict[str, Any]]:
        chunk = run.config.objective.loss_chunk
        view = View(run.program.model, variables, run.refusal_id, samples.label_capacity, chunk)
        counted = (micro["keep"] & (micro["stream"] == place)).astype(jnp.float32)
        total, _ = view.cross_entropy(view.forward(micro), micro["token_ids"], counted[..., None], jnp.ones(1))
        return total, counted.sum(), {}

    return loss


def gradient_ratio(run: Run, samples: Batches, trainable: Any, frozen: Any) -> float:
    """‖gradient‖ on harmful answers with the run's frozen adapters on, over that with them off; of what it trains."""
    loss = answer_loss(run, samples, "harmful")

    @jax.jit
    def norm(trainable: Any, frozen: Any, batch: Any) -> jax.Array:
        return optax.tree.norm(accumulate(loss, trainable, frozen, batch, jax.random.key(0))[0])

    with jax.set_mesh(run.mesh):
        batch = to_devices(samples[0], run.mesh)
        on, off = (float(norm(trainable, each, batch)) for each in (frozen, _off(run, frozen)))
    return on / off


def answer_losses(run: Run, samples: Batches, trainable: Any, frozen: Any) -> dict[str, dict[str, float]]:
    """`{"on": {"harmful", "benign"}, "off": …}`: means over answer tokens, with the frozen adapters on and off."""
    losses = {stream: answer_loss(run, samples, stream) for stream in samples.objective.streams}

    @jax.jit
    def sums(variables: Any, batch: Any) -> Any:
        by_micro = jax.lax.map(lambda micro: {name: loss(variables, micro)[:2] for name, loss in losses.items()}, batch)
        return jax.tree.map(jnp.sum, by_micro)

    count = min(samples.steps_per_epoch, BATCHES)
    found = {}
    with jax.set_mesh(run.mesh):
        for name, each in {"on": frozen, "off": _off(run, frozen)}.items():
            variables = joined(each, trainable)
            batches = (jax.device_get(sums(variables, to_devices(samples[i], run.mesh))) for i in range(count))
            totals = functools.reduce(lambda a, b: jax.tree.map(np.add, a, b), batches)
            found[name] = {stream: float(total / tokens) for stream, (total, tokens) in totals.items()}
    return found


def off_equals_base(run: Run, samples: Batches, trainable: Any, frozen: Any) -> bool:
    """Whether the model with its frozen adapters off is, to the last bit of its hidden states, the one without them."""
    names = {*run.program.frozen_adapters}

    @jax.jit
    def hidden(variables: Any, batch: Any) -> jax.Array:
        micro = jax.tree.map(lambda array: array[0], batch)
        return View(run.program.model, variables, run.refusal_id).forward(micro).hidden

    with jax.set_mesh(run.mesh):
        batch = to_devices(samples[0], run.mesh)
        off = hidden(joined(_off(run, frozen), trainable), batch)
        return bool(jnp.array_equal(off, hidden(joined(_without(frozen, names), trainable), batch)))


def _off(run: Run, frozen: Mapping[str, Any]) -> dict[str, Any]:
    scales = frozen["lora_scale"]["layers"]
    return switched(frozen, scales.keys() - {*run.program.frozen_adapters})


def _without(frozen: Mapping[str, Any], adapters: set[str]) -> dict[str, Any]:
    kept = {name: collection for name, collection in frozen.items() if name != "lora"}
    scales = {name: each for name, each in frozen["lora_scale"]["layers"].items() if name not in adapters}
    return kept | {"lora_scale": {"layers": scales}}
