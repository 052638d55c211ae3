"""Fine-tuning that holds on to an aligned model's first tokens (Qi et al., arXiv 2406.05946, equation 3).

    L = -E Σ_t (2 / β_t) log σ(β_t log(π(y_t | x, y_<t) / π_aligned(y_t | x, y_<t)))

The gradient is that of cross-entropy, each token weighted by 2 σ(-β_t log ratio): at 1 in the beginning, and less the
more likely the token has become than it was; the larger β_t, the sooner. The aligned model is the one that training
begins with. Where all β_t are small this is plain fine-tuning.
"""

from collections.abc import Iterable, Iterator
from typing import Literal

import jax
import jax.numpy as jnp
from pydantic import Field

from derta_jax.config import Data
from derta_jax.data.examples import AuthorsRow, Example, Helpful, Triple
from derta_jax.data.recipes import Row, safe_row
from derta_jax.data.tokenise import Region
from derta_jax.objectives.objective import Mean, Method, Totals
from derta_jax.objectives.view import Batch, View, count_before


class ConstrainedSFT(Method):
    """For fine-tuning an aligned model on data that may not be safe: helpful rows, and the safe answers of triples."""

    name: Literal["constrained_sft"] = "constrained_sft"
    first_beta: float = Field(0.5, gt=0, description="of an answer's first token, where the loss begins high")
    early_beta: float = Field(2.0, gt=0, description="of the tokens after it, up to `early`")
    beta: float = Field(0.1, gt=0, description="of all others")
    early: int = Field(5, ge=1, description="tokens of an answer that are held on to")

    streams = ("mle",)
    needs_reference = True

    def describe(self, data: Data) -> str:
        return "token-wise constrained fine-tuning (arXiv 2406.05946)"

    def rows(self, examples: Iterable[Example], data: Data, seed: int) -> Iterator[Row]:
        for example in examples:
            match example:
                case Triple():
                    yield safe_row(example, "safe", self.name)
                case Helpful(id=id, prompt=prompt, response=response):
                    yield Row(id, self.name, prompt, response)
                case AuthorsRow(id=id):
                    self.refuse_authors_row(id)

    def loss(self, model: View, batch: Batch, key: jax.Array | None, step: jax.Array | int) -> Totals:
        forward = model.forward(batch, key)
        labels, keep = batch["token_ids"], batch["keep"]
        reference = model.reference_nll(batch, labels, keep)
        place = count_before(batch["regions"] >= Region.RESPONSE, batch["segment_ids"])
        beta = jnp.where(place == 0, self.first_beta, jnp.where(place < self.early, self.early_beta, self.beta))

        def measure(nll: jax.Array) -> tuple[jax.Array, jax.Array]:
            return jnp.sum(keep * (2 / beta) * jax.nn.softplus(-beta * (reference - nll))), nll.sum()

        loss_sum, nll = model.loss_of_nll(measure, forward, labels, keep)
        count = keep.sum().astype(jnp.float32)
        return Totals(loss_sum, count, {"loss_mle": Mean(nll, count)}, forward)


OBJECTIVE = ConstrainedSFT
