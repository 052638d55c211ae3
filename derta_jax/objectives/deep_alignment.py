"""Recovery examples of "Safety Alignment Should Be Made More Than Just a Few Tokens Deep" (arXiv 2406.05946, eq. 2).

    L = α E log-loss(r | q, r̂_<k) + (1 - α) E log-loss(y | x)

The safe answer r after the first k words of the harmful one, k = 0 half of the time and else up to 100, beside helpful
examples. The authors cut at tokens; rows of ours are cut at words.
"""

from collections.abc import Iterable, Iterator
from typing import Literal

import jax
import jax.numpy as jnp
from pydantic import Field

from derta_jax.config import Data
from derta_jax.data.examples import AuthorsRow, Example, Helpful, Triple
from derta_jax.data.recipes import Row, example_rng, first_words
from derta_jax.objectives.objective import Coefficient, Mean, Method, Totals, at_step
from derta_jax.objectives.view import Batch, View


class DeepAlignment(Method):
    """Two kinds of rows, each with a mean of its own, whatever their lengths."""

    name: Literal["deep_alignment"] = "deep_alignment"
    alpha: Coefficient = Field(0.2, description="weight of the safety rows' mean; the helpful rows' has the rest")
    no_prefix: float = Field(0.5, ge=0, le=1, description="how often the safe answer stands alone")
    longest_prefix: int = Field(100, ge=1, description="words of the harmful answer before it, else")
    safety_share: float = Field(0.2, gt=0, lt=1, description="of the rows of a batch")

    streams = ("safety", "utility")
    means_by_stream = True
    rows_depend_on = ("no_prefix", "longest_prefix")
    rows_are_drawn = True

    @property
    def shares(self) -> dict[str, float]:
        return {"safety": self.safety_share, "utility": 1 - self.safety_share}

    def describe(self, data: Data) -> str:
        return "deep safety alignment by recovery examples (arXiv 2406.05946)"

    def rows(self, examples: Iterable[Example], data: Data, seed: int) -> Iterator[Row]:
        for example in examples:
            match example:
                case Triple(id=id, prompt=prompt, safe=safe, harmful=harmful):
                    draw = example_rng(seed, id, self.name)
                    words = min(self.longest_prefix, len(harmful.split()))
                    k = 0 if draw.random() < self.no_prefix else int(draw.integers(1, words + 1))
                    prefix = first_words(harmful, k)
                    yield Row(f"{id}#recovery", self.name, prompt, safe, prefix, stream="safety", prefix_words=k)
                case Helpful(id=id, prompt=prompt, response=response):
                    yield Row(id, self.name, prompt, response, stream="utility")
                case AuthorsRow(id=id):
                    self.refuse_authors_row(id)

    def loss(self, model: View, batch: Batch, key: jax.Array | None, step: jax.Array | int) -> Totals:
        forward = model.forward(batch, key)
        weights = jnp.stack([batch["weight"] * (batch["stream"] == place) for place in range(2)], -1)
        alpha = at_step(self.alpha, step)
        loss_sum, sums = model.cross_entropy(forward, batch["token_ids"], weights, jnp.stack([alpha, 1 - alpha]))
        counts = weights.sum((0, 1))
        metrics = {f"loss_{name}": Mean(sums[i], counts[i]) for i, name in enumerate(self.streams)}
        return Totals(loss_sum, counts[0], metrics, forward)


OBJECTIVE = DeepAlignment
