"""The loss on rows that are not trained on, and how ready the model is to refuse, looked at during training."""

import collections
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from derta_jax.config import RunConfig
from derta_jax.data.loader import Batches
from derta_jax.data.packing import Layout
from derta_jax.data.recipes import RECIPES
from derta_jax.data.tokenise import Region, TokenRow
from derta_jax.errors import UserError
from derta_jax.models.decoder import Decoder
from derta_jax.objectives.derta import derta_loss
from derta_jax.objectives.refusal_curve import KINDS, Sums, loss_and_refusal_sums, mean_by_bucket
from derta_jax.training.feed import feed


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
        self.rto_weight, self.mesh = config.objective.rto_weight, mesh
        if config.held_out.refusal_curves:
            rows = [_with_harmful_question(row) for row in rows]
        objective = config.objective.model_copy(update={"sorry_keep_rate": 1.0, "paper": False})
        one_pass = Batches(rows, layout, objective, config.train.seed, steps=1).steps_per_epoch
        steps = min(one_pass, config.held_out.batches or one_pass)
        self.batches = Batches(rows, layout, objective, config.train.seed, steps)

        model = model.clone(lora_dropout=0.0, remat="none")
        make = loss_and_refusal_sums if config.held_out.refusal_curves else _loss_sums
        sums = make(model, objective, refusal_id, self.batches.label_capacity)

        def by_micro_batch(variables: Any, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
            return jax.lax.map(lambda micro: sums(variables, micro), batch)

        self._sums = jax.jit(by_micro_batch, out_shardings=NamedSharding(mesh, PartitionSpec()))

    def evaluate(self, variables: Any) -> dict[str, Any]:
        """Figures of the model `{**frozen, **trainable}`: `held_out_loss` as it is trained, `held_out_loss_mle` and
        `held_out_loss_rto`, in nats a token, None where a kind has no token.

        With `held_out.refusal_curves` also `refusal_harmful` and `refusal_helpful`: a list of buckets of places in
        the answer, `{"from", "to", "p", "n"}`, empty where there is no such answer.
        """
        # simulated CPU devices deadlock when programs run ahead of each other; elsewhere one is dispatched ahead
        ahead = 0 if jax.default_backend() == "cpu" else 1
        in_flight: collections.deque[dict[str, jax.Array]] = collections.deque()
        totals: dict[str, Any] = {}
        with jax.set_mesh(self.mesh):
            for number, (_, batch) in enumerate(feed(self.batches, 0, self.mesh), start=1):
                in_flight.append(self._sums(variables, batch))
                while len(in_flight) > (ahead if number < self.batches.steps else 0):
                    for name, values in jax.device_get(in_flight.popleft()).items():
                        totals[name] = totals.get(name, 0.0) + values.sum(0, dtype=np.float64)
        return self._record(totals)

    def _record(self, totals: dict[str, Any]) -> dict[str, Any]:
        weighted = [totals[f"mle_{what}"] + self.rto_weight * totals[f"rto_{what}"] for what in ("sum", "tokens")]
        record: dict[str, Any] = {
            "held_out_loss": _mean(*weighted),
            "held_out_loss_mle": _mean(totals["mle_sum"], totals["mle_tokens"]),
            "held_out_loss_rto": _mean(totals["rto_sum"], totals["rto_tokens"]),
        }
        if "refusal_sum" in totals:
            curves = zip(KINDS, totals["refusal_sum"], totals["refusal_tokens"], strict=True)
            record |= {f"refusal_{kind}": mean_by_bucket(sums, counts) for kind, sums, counts in curves}
        return record


def format_held_out(record: dict[str, Any]) -> str:
    """One dense line: `held out  loss 1.2345 (mle 1.1000, rto 2.3000)  p(refusal) harmful 0.91 → 0.99 ▇██, …`.

    Probabilities are those of the first and of the last places of an answer; the bars, from 0 to 1, are its buckets.
    """
    losses = {kind: record[f"held_out_loss_{kind}"] for kind in ("mle", "rto")}
    parts = ", ".join(f"{kind} {value:.4f}" for kind, value in losses.items() if value is not None)
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


def _mean(total: float, weight: float) -> float | None:
    return float(total / weight) if weight else None


def _loss_sums(model: Decoder, objective: Any, refusal_id: int, label_capacity: int) -> Sums:
    """The objective's own sums by kind, without a mixture's load balancing."""
    loss = derta_loss(model, objective, refusal_id, label_capacity)

    def sums(variables: Any, micro: dict[str, jax.Array]) -> dict[str, jax.Array]:
        _, _, metrics = loss(variables, micro, jax.random.key(0))
        return {f"{kind}_{what}": metrics[f"{kind}_{what}"] for kind in ("mle", "rto") for what in ("sum", "tokens")}

    return sums


def _with_harmful_question(row: TokenRow) -> TokenRow:
    """A triple's safe answer refuses, prefix or not: its question is marked as harmful, so that it is not taken for a
    helpful one. The authors' rows do not say which questions are harmful.
    """
    if row.recipe not in RECIPES or row.rto:
        return row
    question = row.regions == Region.PROMPT
    return dataclasses.replace(row, regions=np.where(question, np.uint8(Region.HARMFUL_PREFIX), row.regions))
