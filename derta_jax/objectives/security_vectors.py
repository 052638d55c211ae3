"""Security vectors, phase 1 of "Making Harmful Behaviors Unlearnable for Large Language Models" (arXiv 2311.02105).

    L = E_harmful log-loss(r̂ | q) + λ E_benign KL

An adapter takes harm upon itself: while it is active, harmful answers are likely and leave a fine-tune almost nothing
to learn; the KL to the model without it keeps all other behaviour where it was. What is fine-tuned beneath it then is
used without it. λ and the direction of the KL are not known from the paper: they are keys here.
"""

from collections.abc import Iterable, Iterator
from typing import Literal

import jax
import jax.numpy as jnp
from pydantic import Field

from derta_jax.config import Data, RunConfig
from derta_jax.data.examples import AuthorsRow, Example, Helpful, Triple
from derta_jax.data.recipes import Row
from derta_jax.models.lora import DEFAULT
from derta_jax.objectives.objective import Coefficient, Mean, Method, Totals, at_step
from derta_jax.objectives.view import Batch, View


class SecurityVectors(Method):
    """For LoRA. Each term is a mean over the answer tokens of its own rows."""

    name: Literal["security_vectors"] = "security_vectors"
    kl_weight: Coefficient = 1.0
    kl_direction: Literal["forward", "reverse"] = Field(
        "forward", description="forward: KL(without ‖ with the vectors); reverse: the other way round"
    )
    harmful_share: float = Field(0.5, gt=0, lt=1, description="of the rows of a batch")

    streams = ("harmful", "benign")
    means_by_stream = True

    @property
    def shares(self) -> dict[str, float]:
        return {"harmful": self.harmful_share, "benign": 1 - self.harmful_share}

    def check(self, config: RunConfig) -> None:
        if config.lora is None:
            raise ValueError("objective security_vectors trains an adapter on a frozen model: set lora.rank")

    def describe(self, data: Data) -> str:
        return "security vectors (arXiv 2311.02105): to be active while others fine-tune, and off afterwards"

    def rows(self, examples: Iterable[Example], data: Data, seed: int) -> Iterator[Row]:
        """The harmful answers of triples, and helpful rows."""
        for example in examples:
            match example:
                case Triple(id=id, prompt=prompt):
                    yield Row(f"{id}#harmful", self.name, prompt, example.harmful, stream="harmful")
                case Helpful(id=id, prompt=prompt, response=response):
                    yield Row(id, self.name, prompt, response, stream="benign")
                case AuthorsRow(id=id):
                    self.refuse_authors_row(id)

    def loss(self, model: View, batch: Batch, key: jax.Array | None, step: jax.Array | int) -> Totals:
        forward = model.forward(batch, key)
        base = model.without(DEFAULT).frozen().forward(batch)
        harmful, benign = ((batch["weight"] * (batch["stream"] == place))[..., None] for place in range(2))
        learned, _ = model.cross_entropy(forward, batch["token_ids"], harmful, jnp.ones(1))
        kept, divergence = model.divergence(
            forward, base, benign, at_step(self.kl_weight, step)[None], reverse=self.kl_direction == "reverse"
        )
        metrics = {
            "loss_harmful": Mean(jax.lax.stop_gradient(learned), harmful.sum()),
            "loss_kl": Mean(divergence[0], benign.sum()),
        }
        return Totals(learned + kept, harmful.sum(), metrics, forward)


OBJECTIVE = SecurityVectors
