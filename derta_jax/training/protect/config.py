"""One file for the two runs of a protected fine-tune: what the vectors learn, and what the user brings."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from derta_jax.config import Model, RunConfig, Section, config_keys, load_section
from derta_jax.objectives.security_vectors import SecurityVectors

VECTORS, FINE_TUNE = "vectors", "fine_tune"


class Protection(Section):
    """Two runs of one model. Their `model`, their `train.output` and the frozen adapter follow from the rest."""

    model: Model
    output: str = Field(description="a directory: a run for each phase, the vectors, the model and the report")
    vectors: RunConfig = Field(description="phase 1, with the objective security_vectors")
    fine_tune: RunConfig = Field(description="phase 2, on the user's data")

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, raw: Any) -> Any:
        if not isinstance(raw, dict) or not isinstance(raw.get("output"), str):
            return raw
        return raw | {
            phase: _completed(phase, raw) for phase in (VECTORS, FINE_TUNE) if isinstance(raw.get(phase), dict)
        }

    @model_validator(mode="after")
    def _vectors_are_vectors(self) -> "Protection":
        if not isinstance(self.vectors.objective, SecurityVectors):
            raise ValueError("vectors.objective.name must be security_vectors")
        return self

    @property
    def directory(self) -> Path:
        return Path(self.output)

    @property
    def adapter(self) -> Path:
        """The vectors as a PEFT directory."""
        return self.directory / "adapter"

    @property
    def model_directory(self) -> Path:
        """What is released."""
        return self.directory / "model"


def _completed(phase: str, raw: dict[str, Any]) -> dict[str, Any]:
    run = raw[phase]
    train = run.get("train") or {}
    for key, holder in (("model", run), ("output", train)):
        if key in holder:
            raise ValueError(f"{phase}: {key!r} stands at the top of the file, for both phases")
    run = run | {"model": raw.get("model"), "train": train | {"output": str(Path(raw["output"]) / phase)}}
    if phase == VECTORS:
        return run | {"objective": {"name": "security_vectors"} | (run.get("objective") or {})}
    adapters = {VECTORS: str(Path(raw["output"]) / "adapter")}
    return run | {"frozen_adapters": (run.get("frozen_adapters") or {}) | adapters}


def load_protection(path: str | Path, overrides: Sequence[str] = ()) -> Protection:
    """As `config.load_config`; overrides are as `fine_tune.train.steps=50`."""
    return load_section(Protection, path, overrides, [*_keys()])


def _keys() -> Iterator[str]:
    yield from ("model.path", "output")
    for phase in (VECTORS, FINE_TUNE):
        yield phase
        yield from (f"{phase}.{key}" for key in config_keys() if key not in ("model", "model.path", "train.output"))
