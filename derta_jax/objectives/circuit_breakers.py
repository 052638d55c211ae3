"""Circuit breakers by representation rerouting (Zou et al., arXiv 2406.04313, algorithm 1).

    L = c_s E_harmful relu(cos(h, h₀)) + c_r E_retain ‖h - h₀‖₂

h are the residual streams behind layers of the model with its adapter, h₀ without it: harmful text is turned away from
where it led, all other text stays. Nothing is learned of any token; both means are over all tokens of their rows, and
over layers. As in the authors' code c_s falls and c_r rises, over twice the 150 steps that are trained.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from pydantic import Field

from derta_jax.config import Data, RunConfig
from derta_jax.data.examples import AuthorsRow, Example, Helpful, Triple
from derta_jax.data.recipes import Row
from derta_jax.data.tokenise import TokenRow
from derta_jax.errors import UserError
from derta_jax.models.config import ModelConfig
from derta_jax.models.lora import DEFAULT
from derta_jax.objectives.objective import Coefficient, Mean, Method, Totals, at_step
from derta_jax.objectives.view import Batch, View


class CircuitBreakers(Method):
    """For LoRA. Two passes keep the residual streams of all layers: 2 · L · tokens · D numbers a micro-batch."""

    name: Literal["circuit_breakers"] = "circuit_breakers"
    reroute: Coefficient = Field(((0, 10.0), (300, 0.0)), description="c_s by step")
    retain: Coefficient = Field(((0, 0.0), (300, 10.0)), description="c_r by step")
    layers: tuple[int, ...] = Field((10, 20), min_length=1, description="whose outputs are rerouted, counted from 1")
    harmful_share: float = Field(0.5, gt=0, lt=1, description="of the rows of a batch")

    streams = ("harmful", "retain")
    means_by_stream = True

    @property
    def shares(self) -> dict[str, float]:
        return {"harmful": self.harmful_share, "retain": 1 - self.harmful_share}

    def check(self, config: RunConfig) -> None:
        if config.lora is None:
            raise ValueError("objective circuit_breakers trains an adapter beside the frozen model: set lora.rank")

    def check_model(self, model: ModelConfig) -> None:
        if not all(1 <= layer <= model.layers for layer in self.layers):
            raise UserError(f"objective.layers = {list(self.layers)}: the model's layers are 1 to {model.layers}")

    def describe(self, data: Data) -> str:
        return "circuit breakers (representation rerouting, arXiv 2406.04313)"

    def rows(self, examples: Iterable[Example], data: Data, seed: int) -> Iterator[Row]:
        """Harmful answers are rerouted; refusals and helpful answers are retained."""
        for example in examples:
            match example:
                case Triple(id=id, prompt=prompt):
                    yield Row(f"{id}#harmful", self.name, prompt, example.harmful, stream="harmful")
                    yield Row(f"{id}#safe", self.name, prompt, example.safe, stream="retain")
                case Helpful(id=id, prompt=prompt, response=response):
                    yield Row(id, self.name, prompt, response, stream="retain")
                case AuthorsRow(id=id):
                    self.refuse_authors_row(id)

    def keep(self, row: TokenRow, rng: Callable[[], np.random.Generator], padded_length: int) -> np.ndarray:
        return np.ones(len(row), bool)

    def most_labels(self, row: TokenRow) -> int:
        return len(row)

    def loss(self, model: View, batch: Batch, key: jax.Array | None, step: jax.Array | int) -> Totals:
        trained = model.forward(batch, key, layers=True)
        ours, base = (
            _layers(trained.layers),
            _layers(model.without(DEFAULT).frozen().forward(batch, layers=True).layers),
        )
        harmful, retain = (batch["weight"] * (batch["stream"] == place) for place in range(2))
        chosen = np.array(self.layers) - 1
        away = jnp.einsum("LST,ST->", jax.nn.relu(_cosine(ours[chosen], base[chosen])), harmful) / len(chosen)
        moved = jnp.einsum("LST,ST->", _norm(ours - base), retain) / len(ours)
        loss = at_step(self.reroute, step) * away + at_step(self.retain, step) * moved
        return Totals(
            loss, harmful.sum(), {"cosine": Mean(away, harmful.sum()), "distance": Mean(moved, retain.sum())}, trained
        )


def _layers(layers: jax.Array | None) -> jax.Array:
    assert layers is not None
    return layers.astype(jnp.float32)


def _norm(x: jax.Array) -> jax.Array:
    """Over the last axis; at 0, where a fresh adapter begins, its gradient is 0."""
    squares = jnp.sum(x * x, axis=-1)
    return jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1.0)), 0.0)


def _cosine(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.sum(a * b, axis=-1) / jnp.maximum(_norm(a) * _norm(b), 1e-12)


OBJECTIVE = CircuitBreakers
