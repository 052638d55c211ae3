"""What is raced: a run's config, maybe with a model and rows that are made up, and how often."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from derta_jax.config import RunConfig, Section, config_keys, dotted_keys, load_section, read_yaml
from derta_jax.errors import UserError
from derta_jax.models.config import ModelConfig

WARM_UP = 2
"""Steps that are not timed: PyTorch compiles for one shape first, then for any."""
Name = Literal["original", "torch", "padded", "packed"]
CONTENDERS: tuple[Name, ...] = ("original", "torch", "padded", "packed")
"""The authors' way in PyTorch, PyTorch at its best, and ours without packing and with it."""


class Synthetic(Section):
    """Random weights and rows of random tokens. Lengths are drawn evenly from a first to a last number of tokens."""

    architecture: dict[str, Any] = Field(description="what a Hugging Face config.json says")
    rows: int = Field(2048, ge=1)
    prompt_tokens: tuple[int, int] = (20, 80)
    helpful_tokens: tuple[int, int] = (100, 600)
    safety_tokens: tuple[int, int] = (60, 200)
    safety_share: float = Field(0.09, ge=0, le=1, description="of the rows; half of these are RTO's")

    @property
    def model(self) -> ModelConfig:
        """Raises `UserError` for what is no config.json of a model that we have."""
        return ModelConfig.from_hf(self.architecture, "synthetic.architecture")


class Answering(Section):
    """What `derta bench generate` asks: random prompts, of which a random share of the vocabulary ends the answers."""

    prompts: int = Field(256, ge=1)
    prompt_tokens: tuple[int, int] = (8, 64)
    new_tokens: int = Field(256, ge=1, description="at most, of an answer")
    batch_size: int = Field(32, ge=1)
    stop_share: float = Field(1 / 150, gt=0, lt=1)


class Bench(RunConfig):
    """A run of which a few steps are timed. With `synthetic`, `model.path`, `data.path` and lengths may be left out."""

    synthetic: Synthetic | None = None
    answering: Answering = Answering()
    contenders: tuple[Name, ...] = CONTENDERS
    compile_torch: bool = Field(True, description="torch.compile what lies between PyTorch's products")
    repeats: int = Field(5, ge=1, description="timed steps of each, after those that warm up")

    @property
    def steps(self) -> int:
        """Of each contender, timed or not."""
        return WARM_UP + self.repeats

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, raw: Any) -> Any:
        if not isinstance(raw, dict):
            return raw
        train = {"output": "bench", **(raw.get("train") or {}), "epochs": None, "steps": 1}
        raw = raw | {"train": train}
        if raw.get("synthetic"):
            raw = raw | {name: {"path": "synthetic"} | (raw.get(name) or {}) for name in ("model", "data")}
        return raw

    @model_validator(mode="after")
    def _comparable(self) -> "Bench":
        if self.objective.name != "derta" or getattr(self.objective, "rto_weight", None) != 1:
            raise ValueError("objective: the authors' loss is that of `derta` with rto_weight 1")
        if getattr(self.objective, "paper", False) or self.lora or self.train.accumulation > 1:
            raise ValueError("all contenders train all parameters on whole batches: no paper mode, lora, accumulation")
        return self


def load_bench(path: str | Path, overrides: Sequence[str] = ()) -> Bench:
    """As `config.load_config`; also where there is no PyTorch to race against."""
    keys = {*config_keys(), *dotted_keys(Bench), *_architecture_keys(read_yaml(path))}
    bench = load_section(Bench, path, overrides, sorted(keys))
    if {"original", "torch"} & {*bench.contenders} and importlib.util.find_spec("torch") is None:
        raise UserError("there is no PyTorch here: pip install 'derta-jax[torch]', or contenders=[padded,packed]")
    return bench


def _architecture_keys(raw: dict[str, Any]) -> list[str]:
    """Of the made-up model, as the file sets them: its own config.json, of which no class knows the keys."""
    synthetic = raw.get("synthetic")
    architecture = synthetic.get("architecture") if isinstance(synthetic, dict) else None
    return [f"synthetic.architecture.{key}" for key in architecture] if isinstance(architecture, dict) else []
