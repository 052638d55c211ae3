"""Direct preference optimisation (Rafailov et al., arXiv 2305.18290, equation 7), the baseline of DeRTa's paper.

    L = -E log σ(β (log π(c | q) / π_ref(c | q) - log π(r | q) / π_ref(r | q)))

The safe answer c of a triple is chosen over the harmful one r, and the response of a helpful example over its
`rejected`. The reference is the model that training begins with: with LoRA the one beneath the adapter, in the same
program; else its log-probabilities are computed once, before the first step.
"""

from collections.abc import Iterable, Iterator
from typing import Literal

import jax
import jax.numpy as jnp
from pydantic import field_validator

from derta_jax.config import Data
from derta_jax.data.examples import AuthorsRow, Example, Helpful, Triple
from derta_jax.data.recipes import Row
from derta_jax.errors import UserError
from derta_jax.objectives.objective import Coefficient, Mean, Method, Totals, at_step
from derta_jax.objectives.view import Batch, View


class DPO(Method):
    """Pairs of a chosen and a rejected answer to one prompt, side by side in one sequence."""

    name: Literal["dpo"] = "dpo"
    beta: Coefficient = 0.1

    streams = ("chosen", "rejected")
    needs_reference = True

    @field_validator("beta")
    @classmethod
    def _moves(cls, beta: Coefficient) -> Coefficient:
        if not beta or (isinstance(beta, tuple) and not all(value for _, value in beta)):
            raise ValueError("must be more than 0: at 0 there is nothing to learn")
        return beta

    def describe(self, data: Data) -> str:
        return "DPO (arXiv 2305.18290): safe answers over harmful ones"

    def facts(self, data: Data) -> dict[str, str]:
        return {"DPO": f"beta {self.beta}"}

    def rows(self, examples: Iterable[Example], data: Data, seed: int) -> Iterator[Row]:
        """Two rows a pair, of triples and of those helpful examples that have a `rejected` answer."""
        pairs = 0
        for example in examples:
            match example:
                case Triple(id=id, prompt=prompt, safe=chosen, harmful=rejected):
                    pass
                case Helpful(id=id, prompt=prompt, response=chosen, rejected=rejected) if rejected:
                    pass
                case AuthorsRow(id=id):
                    self.refuse_authors_row(id)
                case _:
                    continue
            pairs += 1
            for stream, answer in (("chosen", chosen), ("rejected", rejected)):
                yield Row(f"{id}#{stream}", self.name, prompt, answer, stream=stream, pair=id)
        if not pairs:
            raise UserError("objective dpo: the data has no pair; it takes triples, or helpful rows with `rejected`")

    def loss(self, model: View, batch: Batch, key: jax.Array | None, step: jax.Array | int) -> Totals:
        """Each pair weighs 1. `margin` is β times how much more than the reference the model prefers the chosen one."""
        forward = model.forward(batch, key)
        labels, keep, segments = batch["token_ids"], batch["keep"], batch["segment_ids"]
        reference = model.reference_nll(batch, labels, keep)
        rejected = sums_by_segment(keep & (batch["stream"] == self.streams.index("rejected")), segments) > 0
        beta = at_step(self.beta, step)

        def measure(nll: jax.Array) -> tuple[jax.Array, jax.Array]:
            rewards = beta * sums_by_segment((reference - nll) * keep, segments)
            # a pair's chosen answer is the segment before the rejected one
            margins = jnp.pad(rewards[:, :-1], ((0, 0), (1, 0))) - rewards
            return jnp.sum(jax.nn.softplus(-margins) * rejected), margins * rejected

        loss_sum, margins = model.loss_of_nll(measure, forward, labels, keep)
        pairs = rejected.sum().astype(jnp.float32)
        metrics = {
            "loss_dpo": Mean(jax.lax.stop_gradient(loss_sum), pairs),
            "margin": Mean(margins.sum(), pairs),
            "accuracy": Mean((margins > 0).sum().astype(jnp.float32), pairs),
        }
        return Totals(loss_sum, pairs, metrics, forward)


def sums_by_segment(values: jax.Array, segment_ids: jax.Array) -> jax.Array:
    """Float32 [S, T + 1]: `values` [S, T] summed over each segment's tokens, by its id."""
    count = values.shape[1] + 1
    one_sequence = jax.vmap(lambda values, ids: jax.ops.segment_sum(values, ids, num_segments=count))
    return one_sequence(values.astype(jnp.float32), segment_ids)


OBJECTIVE = DPO
