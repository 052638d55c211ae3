"""What an objective is: keys of the config, the rows it makes of examples, and a loss over views of the model.

One file of this package is one objective: a subclass of `Method`, named `OBJECTIVE` in its module. docs/objectives.md
writes one from nothing.
"""

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Annotated, Any, ClassVar, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from pydantic import PlainValidator

from derta_jax.config import Data, Objective, RunConfig
from derta_jax.data.examples import Example
from derta_jax.data.recipes import Row
from derta_jax.data.tokenise import TokenRow
from derta_jax.errors import UserError
from derta_jax.models.config import ModelConfig
from derta_jax.models.decoder import Decoder
from derta_jax.models.moe import load_balancing_loss
from derta_jax.objectives.view import Batch, Forward, View

LAST_STEP = np.iinfo(np.int32).max
"""Where every schedule has come to its end."""


class Mean(NamedTuple):
    """A figure of a batch as two sums, so that micro-batches add up: `total / count`, none where that is 0."""

    total: Any
    count: Any


def mean_of(figure: Mean) -> float | None:
    """A figure that has come to the host."""
    return float(figure.total) / float(figure.count) if figure.count else None


class Totals(NamedTuple):
    """A micro-batch's share of the loss, which is Σ loss_sum / Σ weight_sum over all of them, and figures to log.

    The load balancing of a mixture's router is added to the loss for `trained`, a forward pass that has gradients.
    """

    loss_sum: jax.Array
    weight_sum: jax.Array
    metrics: Mapping[str, Mean]
    trained: Forward | None = None


def _coefficient(value: Any) -> Any:
    try:
        if isinstance(value, int | float) and not isinstance(value, bool):
            points = [(0, float(value))]
        else:
            points = [(int(step), float(number)) for step, number in value]
    except (TypeError, ValueError):
        points = []
    steps = [step for step, _ in points]
    if not points or steps != sorted({*steps}) or not all(0 <= number < math.inf for _, number in points):
        raise ValueError("must be a number from 0 on, or a list of [step, number] with increasing steps")
    return tuple(points) if isinstance(value, list | tuple) else points[0][1]


Coefficient = Annotated[Any, PlainValidator(_coefficient)]
"""A number, or `[[step, value], …]`: linear between these steps, constant before and after them."""


def at_step(coefficient: Any, step: jax.Array | int) -> jax.Array:
    """A `Coefficient`'s value at a step, counted from 0."""
    if isinstance(coefficient, float | int):
        return jnp.float32(coefficient)
    steps, values = zip(*coefficient, strict=True)
    return jnp.interp(jnp.float32(step), jnp.array(steps, jnp.float32), jnp.array(values, jnp.float32))


class Method(Objective):
    """An objective. Frozen, and nothing but its keys: all that it computes is a function of its arguments."""

    streams: ClassVar[tuple[str, ...]]
    """The kinds of rows it makes; `batch["stream"]` holds their places in this tuple."""
    refusing: ClassVar[tuple[str, ...]] = ()
    """Streams whose answers are harmful, and learn the refusal token in place of each of their own."""
    rows_depend_on: ClassVar[tuple[str, ...]] = ()
    """Keys of its own that decide the rows, which are made anew where these change."""
    rows_are_drawn: ClassVar[bool] = False
    """Whether the run's seed decides them, too."""
    means_by_stream: ClassVar[bool] = False
    """Whether batches bring `weight`, float32: 1 / how many tokens of its stream a step keeps, 0 for others. A sum with
    it is the mean over a stream's tokens of the whole step, however that is cut into micro-batches.
    """
    needs_reference: ClassVar[bool] = False
    """Whether `View.reference_nll` is asked for: how likely the model that training begins with finds each token."""

    def check_model(self, model: ModelConfig) -> None:
        """Raise `UserError` where the model is not one that it works on."""

    def describe(self, data: Data) -> str:
        """What it is, with its source, in a phrase that goes on `tuned by …`; for model cards."""
        return f"the objective {self.name}"

    def facts(self, data: Data) -> dict[str, str]:
        """What a model card says of its settings."""
        return {}

    @property
    def shares(self) -> dict[str, float] | None:
        """How much of each batch is of which stream. None: all rows are drawn from one pot, as many as there are."""
        return None

    @property
    def mean_of_means(self) -> bool:
        """Whether each micro-batch's mean counts the same, however many labels it has."""
        return False

    def in_full(self) -> "Method":
        """The same with no label dropped, all in one mean: how held-out rows are measured."""
        return self

    @abstractmethod
    def rows(self, examples: Iterable[Example], data: Data, seed: int) -> Iterator[Row]:
        """What is trained on, from the examples of a dataset in their order."""

    def refuse_authors_row(self, id: str) -> NoReturn:
        """Raise `UserError`: such a row is one answer, and says nothing of others to its question."""
        raise UserError(
            f"objective {self.name}: {id} is a row of the authors' files, which has one answer: bring triples"
        )

    def keep(self, row: TokenRow, rng: Callable[[], np.random.Generator], padded_length: int) -> np.ndarray:
        """Bool [n]: which of the row's tokens count in this epoch; `rng` is the row's own draw for it."""
        return row.labelled

    def most_labels(self, row: TokenRow) -> int:
        """The most tokens that `keep` may keep of a row."""
        return int(np.count_nonzero(row.labelled))

    def weight(self, stream: str) -> float:
        """What a token of a stream weighs at the first step; for people who look at rows."""
        return 1.0

    @abstractmethod
    def loss(self, model: View, batch: Batch, key: jax.Array | None, step: jax.Array | int) -> Totals:
        """Of a micro-batch. `key` is that of dropout, None for none; `step` counts from 0, for coefficients."""


def of_config(config: RunConfig) -> Method:
    """The objective of a run."""
    if not isinstance(config.objective, Method):
        raise TypeError(f"{type(config.objective)} is no Method")
    return config.objective


Loss = Callable[..., tuple[jax.Array, jax.Array, dict[str, Mean]]]
"""(variables, micro-batch, dropout key, step=0) → (loss_sum, weight_sum, metrics)."""


def objective_loss(objective: Method, model: Decoder, refusal_id: int, label_capacity: int | None = None) -> Loss:
    """The loss that is trained: the objective's, and `router_aux_weight` times a mixture's load-balancing loss.

    Micro-batches are laid out as `data.loader.Batch` describes, without the accumulation axis. The balance is that of
    a micro-batch's real tokens, and micro-batches count by their weights; its metric counts by tokens.
    """

    def loss(
        variables: Any, batch: Batch, key: jax.Array, step: jax.Array | int = 0
    ) -> tuple[jax.Array, jax.Array, dict[str, Mean]]:
        view = View(model, variables, refusal_id, label_capacity, objective.loss_chunk)
        loss_sum, weight_sum, metrics, trained = objective.loss(view, batch, key, step)
        if trained is None or trained.router is None:
            return loss_sum, weight_sum, dict(metrics)
        tokens = (batch["segment_ids"] > 0).sum()
        # a micro-batch may be padding alone
        balance = load_balancing_loss(trained.router, jnp.maximum(tokens, 1))
        loss_sum += objective.router_aux_weight * balance * weight_sum
        return loss_sum, weight_sum, {**metrics, "loss_aux": Mean(balance * tokens, tokens.astype(jnp.float32))}

    return loss
