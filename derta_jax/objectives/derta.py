"""Decoupled Refusal Training: MLE after a harmful prefix and reinforced transition optimisation, in one pass.

    L = -E log P(r | q, r̂_<k) - E Σ_t log P(sorry | q, r̂_<t)        (arXiv 2407.09121, equation 2)

The vanilla, RecAug and RTO-only ablations are the same objective over other rows (`data.recipe`).
"""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from pydantic import Field

from derta_jax.config import Data, RunConfig
from derta_jax.data.examples import Example
from derta_jax.data.recipes import Row, rows_from_examples
from derta_jax.data.tokenise import TokenRow
from derta_jax.objectives.objective import Coefficient, Mean, Method, Totals, at_step
from derta_jax.objectives.view import Batch, View

RECIPES = {
    "derta": "Decoupled Refusal Training (DeRTa, arXiv 2407.09121): MLE after a harmful prefix, and RTO",
    "rto": "the RTO ablation of DeRTa (arXiv 2407.09121): the refusal token at every position of harmful answers",
    "recaug": "the RecAug ablation of DeRTa (arXiv 2407.09121): safe answers after a harmful prefix",
    "vanilla": "vanilla safety tuning, the baseline of DeRTa (arXiv 2407.09121)",
}
"""What each `data.recipe` makes of this objective."""


class Derta(Method):
    """DeRTa's two terms, and the authors' quirks."""

    name: str = "derta"
    rto_weight: Coefficient = Field(1.0, description="weight of an RTO token beside an MLE token's 1; may be scheduled")
    sorry_keep_rate: float = Field(1.0, gt=0, le=1, description="share of RTO positions that keep their label")
    paper: bool = Field(False, description="the authors' quirks: RTO drop over the padded row, mean of means")

    streams: ClassVar[tuple[str, ...]] = ("mle", "rto")
    refusing = ("rto",)

    def check(self, config: RunConfig) -> None:
        if self.paper and config.data.packing != "none":
            raise ValueError("objective.paper drops RTO labels by padded row: it needs data.packing=none")

    def describe(self, data: Data) -> str:
        return RECIPES[data.recipe]

    def facts(self, data: Data) -> dict[str, str]:
        weight = self.rto_weight if isinstance(self.rto_weight, tuple) else f"{self.rto_weight:g}"
        rto = f"weight {weight}, {self.sorry_keep_rate:.0%} of positions keep their label"
        return {"recipe": data.recipe, "RTO": rto}

    @property
    def mean_of_means(self) -> bool:
        return self.paper

    def in_full(self) -> Method:
        return self.model_copy(update={"sorry_keep_rate": 1.0, "paper": False})

    def rows(self, examples: Iterable[Example], data: Data, seed: int) -> Iterator[Row]:
        return rows_from_examples(examples, data.recipe, seed, data.paper)

    def keep(self, row: TokenRow, rng: Callable[[], np.random.Generator], padded_length: int) -> np.ndarray:
        """The labelled tokens, thinned out for RTO rows ("sorry dropout"): `max(1, ceil(rate · n))` of them stay.

        With `paper` the draw is over all `padded_length` positions of the padded row, as the authors' code does it, so
        that few or none of the labels may survive.
        """
        labelled = row.labelled
        if row.stream != "rto" or self.sorry_keep_rate == 1.0:
            return labelled
        candidates = np.arange(padded_length) if self.paper else np.flatnonzero(labelled)
        count = max(1, math.ceil(self.sorry_keep_rate * len(candidates)))
        drawn = np.zeros(max(padded_length, len(row)), bool)
        drawn[rng().choice(candidates, count, replace=False)] = True
        return labelled & drawn[: len(row)]

    def most_labels(self, row: TokenRow) -> int:
        labels = super().most_labels(row)
        if row.stream != "rto" or self.paper:
            return labels
        return max(1, math.ceil(self.sorry_keep_rate * labels))

    def weight(self, stream: str) -> float:
        return float(at_step(self.rto_weight, 0)) if stream == "rto" else 1.0

    def loss(self, model: View, batch: Batch, key: jax.Array | None, step: jax.Array | int) -> Totals:
        """Each kept token weighs 1, each kept token of an RTO row `rto_weight`."""
        forward = model.forward(batch, key)
        of_stream = batch["stream"][..., None] == jnp.arange(len(self.streams))
        labels = jnp.where(of_stream[..., self.streams.index("rto")], model.refusal_id, batch["token_ids"])
        kinds = (batch["keep"][..., None] & of_stream).astype(jnp.float32)
        rto_weight = at_step(self.rto_weight, step)
        weights = jnp.stack([rto_weight if stream == "rto" else jnp.float32(1) for stream in self.streams])
        loss_sum, sums = model.cross_entropy(forward, labels, kinds, weights)
        counts = kinds.sum((0, 1))
        metrics = {f"loss_{kind}": Mean(sums[i], counts[i]) for i, kind in enumerate(self.streams)}
        return Totals(loss_sum, counts @ weights, metrics, forward)


OBJECTIVE = Derta
