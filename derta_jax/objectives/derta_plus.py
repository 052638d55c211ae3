"""DeRTa that begins later: no refusal is taught at the first tokens of a harmful answer, where nothing is wrong yet."""

from collections.abc import Callable

import numpy as np
from pydantic import Field

from derta_jax.data.tokenise import TokenRow
from derta_jax.objectives.derta import Derta


class DertaPlus(Derta):
    """DeRTa whose RTO rows have no label at their answer's first `delay` tokens."""

    name: str = "derta_plus"
    delay: int = Field(4, ge=0, description="tokens of a harmful answer before the refusal is taught")

    def keep(self, row: TokenRow, rng: Callable[[], np.random.Generator], padded_length: int) -> np.ndarray:
        kept = super().keep(row, rng, padded_length)
        if row.stream == "rto":
            kept[np.flatnonzero(row.labelled)[: self.delay]] = False
        return kept


OBJECTIVE = DertaPlus
