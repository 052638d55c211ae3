"""What the way from examples to batches asks of an objective: which rows there are, and which tokens of them count."""

from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

import numpy as np

from derta_jax.config import Data
from derta_jax.data.examples import Example
from derta_jax.data.recipes import Row
from derta_jax.data.tokenise import TokenRow


class RowMaker(Protocol):
    """`objectives.objective.Method` describes each."""

    @property
    def name(self) -> str: ...

    @property
    def streams(self) -> tuple[str, ...]: ...

    @property
    def refusing(self) -> tuple[str, ...]: ...

    @property
    def shares(self) -> dict[str, float] | None: ...

    @property
    def mean_of_means(self) -> bool: ...

    @property
    def means_by_stream(self) -> bool: ...

    def rows(self, examples: Iterable[Example], data: Data, seed: int) -> Iterator[Row]: ...

    def keep(self, row: TokenRow, rng: Callable[[], np.random.Generator], padded_length: int) -> np.ndarray: ...

    def most_labels(self, row: TokenRow) -> int: ...

    def weight(self, stream: str) -> float: ...
