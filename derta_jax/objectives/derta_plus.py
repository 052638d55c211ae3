"""DeRTa that is taught what only looks harmful: look-alikes, harmless questions with their answers, and RTO that waits.

Refusals learned at every position spread to harmless questions of like looks. Answering some of these while training
takes most of that back; where RTO begins a few tokens into a harmful answer, where it has turned harmful, fewer attacks
come through for it. docs/over_refusal.md has the trials, and what did not help.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator

import numpy as np
from pydantic import Field

from derta_jax.config import Data
from derta_jax.data.examples import Example, Helpful
from derta_jax.data.recipes import Row
from derta_jax.data.tokenise import TokenRow
from derta_jax.errors import UserError
from derta_jax.objectives.derta import Derta

LOOKALIKE = "lookalike"


class DertaPlus(Derta):
    """For data with helpful rows whose `category` is `lookalike`; their loss is shown on its own."""

    name: str = "derta_plus"
    delay: int = Field(5, ge=0, description="tokens of a harmful answer before the refusal is taught")

    streams = ("mle", "rto", LOOKALIKE)

    def describe(self, data: Data) -> str:
        return f"{super().describe(data)}, with answers to harmless look-alikes"

    def facts(self, data: Data) -> dict[str, str]:
        facts = super().facts(data)
        return facts | {"RTO": f"{facts['RTO']}, from token {self.delay} of an answer on"}

    def rows(self, examples: Iterable[Example], data: Data, seed: int) -> Iterator[Row]:
        """Raises `UserError` where there is no look-alike."""
        examples = list(examples)
        found = {example.id for example in examples if isinstance(example, Helpful) and example.category == LOOKALIKE}
        if not found:
            raise UserError(
                f"objective {self.name} learns from harmless look-alikes, and there is none: give helpful rows that "
                f'look harmful "category": "{LOOKALIKE}"'
            )
        for row in super().rows(examples, data, seed):
            yield dataclasses.replace(row, stream=LOOKALIKE) if row.id in found else row

    def keep(self, row: TokenRow, rng: Callable[[], np.random.Generator], padded_length: int) -> np.ndarray:
        """As DeRTa's, and no label at the first `delay` tokens of a harmful answer; the last one keeps its own."""
        kept = super().keep(row, rng, padded_length)
        if row.stream == "rto":
            labelled = np.flatnonzero(row.labelled)
            kept[labelled[: min(self.delay, len(labelled) - 1)]] = False
        return kept


OBJECTIVE = DertaPlus
