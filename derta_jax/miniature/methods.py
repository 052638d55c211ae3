"""The ways to tune the miniature's base model: which objective on which model, and for how long."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from derta_jax.errors import UserError, did_you_mean


@dataclasses.dataclass(frozen=True)
class Tuning:
    """`label` is the report's word for it; `begins_with` is the base model, or another tuning's outcome. `data` are the
    tuning rows alone, or with `lookalikes`.
    """

    label: str
    recipe: str = "derta"
    objective: Mapping[str, Any] = dataclasses.field(default_factory=lambda: {"name": "derta"})
    begins_with: str = "base"
    data: str = "tuning"
    steps: int = 600
    learning_rate: float = 7e-4


TUNINGS = {
    "vanilla": Tuning("vanilla", "vanilla"),
    "recaug": Tuning("RecAug", "recaug"),
    "rto": Tuning("RTO", "rto"),
    "derta": Tuning("DeRTa", "derta"),
    "dpo": Tuning("DPO", objective={"name": "dpo"}, begins_with="vanilla", steps=150, learning_rate=5e-5),
    "derta_plus": Tuning("DeRTa+", objective={"name": "derta_plus"}, data="lookalikes"),
}
PAPERS = ("vanilla", "recaug", "rto", "derta")
"""What `derta demo` compares unless told otherwise."""
SECURITY_VECTORS, ALIGNED = "security_vectors", "derta"
"""Measured beside the others, on questions of its own, and the method whose model it protects."""


def parse_methods(text: str) -> list[str]:
    """`vanilla,dpo` as names, and what they begin with before them. Raises `UserError` for one that there is not."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    known = [*TUNINGS, SECURITY_VECTORS]
    for name in names:
        if name not in known:
            raise UserError(f"--methods: no method {name!r} (there are {', '.join(known)}){did_you_mean(name, known)}")
    if not names:
        raise UserError(f"--methods: name at least one of {', '.join(known)}")
    return in_order(names)


def in_order(names: Sequence[str]) -> list[str]:
    """Each once, after the one that it begins with."""
    ordered: dict[str, None] = {}
    for name in names:
        before = ALIGNED if name == SECURITY_VECTORS else TUNINGS[name].begins_with
        if before != "base":
            ordered[before] = None
        ordered[name] = None
    return list(ordered)
