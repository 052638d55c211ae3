"""The loss on rows that are not trained on, and how ready the model is to refuse, looked at during training."""

import collections
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from derta_jax.config import RunConfig
from derta_jax.data.loader import Batches
from derta_jax.data.packing import Layout
from derta_jax.data.recipes import RECIPES
from derta_jax.data.tokenise import Region, TokenRow
from derta_jax.errors import UserError
from derta_jax.models.decoder import Decoder
from derta_jax.objectives.objective import LAST_STEP, Mean, mean_of, of_config
from derta_jax.objectives.refusal_curve import KINDS, mean_by_bucket, refusal_sums
from derta_jax.objectives.view import View
from derta_jax.training.compiler import compiler_options
from derta_jax.training.feed import feed

CURVES = "refusal"


class HeldOut:
    """Held-out rows, laid out like the batches that are trained on; made once a run, asked at any of its steps.

    Every row counts once with all of its labels, in the same batches at each evaluation, or the first
    `held_out.batches` of these. Adapters' inputs are not dropped, and a mixture's load-balancing loss is left out.
    The figures are sums over all labelled tokens, divided once: on any mesh, in any layout, the same; with
    `objective.paper` too, whose training loss is a mean of means.
    """

    def __init__(
        self, config: RunConfig, rows: Sequence[TokenRow], model: Decoder, refusal_id: int, layout: Layout, mesh: Mesh
    ):
        """`model`, `layout` and `mesh` are those of the train step. Raises `UserError` where there is no row."""
        if config.held_out is None:
            raise ValueError("a run without held_out.path")
        if layout.shards != mesh.size // mesh.shape["tensor"]:
            # each device looks at its own part of the labels only
            raise ValueError(f"a layout for {layout.shards} devices on the mesh {dict(mesh.shape)}")
        if not rows:
            raise UserError(
                f"held_out.path: no row of {config.held_out.path} has a labelled token left: "
                "raise train.sequence_length"
            )
        self.mesh = mesh
        if config.held_out.refusal_curves:
            rows = [_with_harmful_question(row) for row in rows]
        objective = of_config(config).in_full()
        one_pass = Batches(rows, layout, objective, config.train.seed, steps=1).steps_per_epoch
        steps = min(one_pass, config.held_out.batches or one_pass)
        self.batches = Batches(rows, layout, objective, config.train.seed, steps)

        model = model.clone(lora_dropout=0.0, remat="none")
        capacity, curves = self.batches.label_capacity, config.held_out.refusal_curves
        refusing = jnp.array([stream in objective.refusing for stream in objective.streams])

        def sums(variables: Any, micro: dict[str, jax.Array]) -> dict[str, Mean]:
            view = View(model, variables, refusal_id, capacity, objective.loss_chunk)
            totals = objective.loss(view, micro, None, LAST_STEP)
            figures = {"loss": Mean(totals.loss_sum, totals.weight_sum), **totals.metrics}
            return figures | ({CURVES: refusal_sums(view, micro, refusing[micro["stream"]])} if curves else {})

        def by_micro_batch(variables: Any, batch: dict[str, jax.Array]) -> dict[str, Mean]:
            return jax.lax.map(lambda micro: sums(variables, micro), batch)

        self._sums = jax.jit(
            by_micro_batch,
            out_shardings=NamedSharding(mesh, PartitionSpec()),
            compiler_options=compiler_options(mesh),
        )

    def evaluate(self, variables: Any) -> dict[str, Any]:
        """Figures of a model of these collections: `held_out_loss` as it is trained, and the objective's own,
        `held_out_loss_mle` and so on, None where there was nothing to count.

        With `held_out.refusal_curves` also `refusal_harmful` and `refusal_helpful`: a list of buckets of places in
        the answer, `{"from", "to", "p", "n"}`, empty where there is no such answer.
        """
        # simulated CPU devices deadlock when programs run ahead of each other; elsewhere one is dispatched ahead
        ahead = 0 if jax.default_backend() == "cpu" else 1
        in_flight: collections.deque[dict[str, Mean]] = collections.deque()
        totals: dict[str, Mean] = {}
        with jax.set_mesh(self.mesh):
            for number, (_, batch) in enumerate(feed(self.batches, 0, self.mesh), start=1):
                in_flight.append(self._sums(variables, batch))
                while len(in_flight) > (ahead if number < self.batches.steps else 0):
                    for name, sums in jax.device_get(in_flight.popleft()).items():
                        total, count = (part.sum(0, dtype=np.float64) for part in sums)
                        before = totals.get(name, Mean(0.0, 0.0))
                        totals[name] = Mean(before.total + total, before.count + count)
        return _record(totals)


def _record(totals: dict[str, Mean]) -> dict[str, Any]:
    record: dict[str, Any] = {f"held_out_{name}": mean_of(total) for name, total in totals.items() if name != CURVES}
    if CURVES in totals:
        curves = zip(KINDS, *totals[CURVES], strict=True)
        record |= {f"refusal_{kind}": mean_by_bucket(sums, counts) for kind, sums, counts in curves}
    return record


def format_held_out(record: dict[str, Any]) -> str:
    """One dense line: `held out  loss 1.2345 (mle 1.1000, rto 2.3000)  p(refusal) harmful 0.91 → 0.99 ▇██, …`.

    Probabilities are those of the first and of the last places of an answer; the bars, from 0 to 1, are its buckets.
    """
    figures = {name.removeprefix("held_out_"): value for name, value in record.items() if value is not None}
    parts = ", ".join(
        f"{name.removeprefix('loss_')} {value:.4f}" for name, value in figures.items() if name.startswith("loss_")
    )
    loss = record["held_out_loss"]
    text = f"held out  loss {'-' if loss is None else f'{loss:.4f}'} ({parts})"
    curves = {kind: [bucket["p"] for bucket in record.get(f"refusal_{kind}", ())] for kind in KINDS}
    shown = [f"{kind} {curve[0]:.2f} → {curve[-1]:.2f} {_bars(curve)}" for kind, curve in curves.items() if curve]
    return text + (f"  p(refusal) {', '.join(shown)}" if shown else "")


def _bars(values: Sequence[float]) -> str:
    """Values from 0 to 1 as a row of bars; `?` for what is no number."""
    levels = "▁▂▃▄▅▆▇█"
    bars = (levels[min(int(value * len(levels)), len(levels) - 1)] if math.isfinite(value) else "?" for value in values)
    return "".join(bars)


def _with_harmful_question(row: TokenRow) -> TokenRow:
    """A triple's safe answer refuses, prefix or not: its question is marked as harmful, so that it is not taken for a
    helpful one. The authors' rows do not say which questions are harmful.
    """
    if row.recipe not in RECIPES or row.stream == "rto":
        return row
    question = row.regions == Region.PROMPT
    return dataclasses.replace(row, regions=np.where(question, np.uint8(Region.HARMFUL_PREFIX), row.regions))
