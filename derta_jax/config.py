"""What a run is: YAML + `key=value` overrides → a validated, frozen `RunConfig`.

Unknown keys are errors with the nearest valid spelling; every message names the dotted key and the value given.
"""

import functools
import importlib
import importlib.metadata
import importlib.util
import pkgutil
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, cast, get_args

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializeAsAny,
    ValidationError,
    field_validator,
    model_validator,
)

from derta_jax.errors import UserError, did_you_mean


class Section(BaseModel):
    """Part of a config: frozen, and a key it does not know is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


S = TypeVar("S", bound=Section)


class Model(Section):
    """What is trained."""

    path: str = Field(
        description="Hugging Face directory, hub id or gs:// URL; a PEFT adapter; a run or converted checkpoint"
    )


class Data(Section):
    """What it is trained on, and how examples become rows."""

    path: str = Field(description="a directory written by `derta prepare`, or a JSONL file; on disk or `gs://…`")
    recipe: Literal["vanilla", "recaug", "rto", "derta"] = Field(
        "derta", description="how triples become rows; helpful rows and the authors' rows are the same in all"
    )
    packing: Literal["none", "rows", "tree"] = Field(
        "rows", description="several rows in one sequence, or one row each; tree: what two rows share is computed once"
    )
    template: str = Field(
        r"[INST] {prompt} [\INST]",
        description="text around a prompt, or `chat` for the tokenizer's own chat template",
    )
    paper: bool = Field(
        False,
        description="the authors' prefixes: none for each third triple, else 1 to n-2 words, and their spacing",
    )

    @field_validator("packing", mode="before")
    @classmethod
    def _packing_from_bool(cls, value: Any) -> Any:
        return {True: "rows", False: "none"}.get(value, value) if isinstance(value, bool) else value

    @field_validator("template")
    @classmethod
    def _template_has_prompt(cls, value: str) -> str:
        if value != "chat" and value.count("{prompt}") != 1:
            raise ValueError("must be `chat` or contain {prompt} once")
        if value.endswith(" "):
            raise ValueError("must not end in a space: the one before the answer is added")
        return value


class Objective(Section):
    """The loss, by name. What all objectives can be told; each adds keys of its own (`derta_jax.objectives`)."""

    name: str = "derta"
    refusal_token: str = Field("Sorry", min_length=1, description="` Sorry` takes the variant with a leading space")
    router_aux_weight: float = Field(
        0.0, ge=0, description="of a mixture's load-balancing loss; transformers has it at 0 unless asked for"
    )
    loss_chunk: int = Field(128, ge=1, description="labelled tokens of a device whose logits exist at a time")

    def check(self, config: "RunConfig") -> None:
        """Raise `ValueError` where the rest of the config does not go with it."""


class Lora(Section):
    """Low-rank adapters, trained instead of the weights (Hu et al., arXiv 2106.09685); the defaults are the paper's."""

    rank: int = Field(96, ge=1)
    alpha: float = Field(16.0, gt=0, description="adapters count alpha / rank")
    dropout: float = Field(0.05, ge=0, lt=1, description="of an adapter's input")
    targets: tuple[str, ...] | None = Field(
        None, description="Hugging Face's module names, as q_proj; null for every linear layer, experts included"
    )
    quantise: Literal["nf4"] | None = Field(
        None, description="nf4: the frozen linear layers in 4 bits (QLoRA); null: in train.dtype"
    )

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


class Train(Section):
    """The run: its length, its batches, its optimizer."""

    output: str = Field(description="the run directory: config, metrics, checkpoints")
    steps: int | None = Field(None, ge=1)
    epochs: float | None = Field(None, gt=0)
    batch_size: int = Field(128, ge=1, description="rows in one update, over all devices")
    accumulation: int = Field(1, ge=1, description="micro-batches of one update")
    sequence_length: int = Field(1024, ge=2, description="tokens; longer rows are cut on the right")
    learning_rate: float = Field(2e-5, gt=0)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: float = Field(0.03, ge=0, lt=1, description="share of the steps")
    weight_decay: float = Field(0.0, ge=0)
    b1: float = Field(0.9, ge=0, lt=1)
    b2: float = Field(0.999, ge=0, lt=1)
    eps: float = Field(1e-8, gt=0)
    clip: float | None = Field(1.0, gt=0, description="largest global gradient norm; null for none")
    seed: int = Field(0, ge=0)
    dtype: Literal["float32", "bfloat16"] = Field("bfloat16", description="compute; master weights are float32")
    optimizer_dtype: Literal["float32", "bfloat16"] = Field("float32", description="of Adam's two moments")
    remat: Literal["none", "dots", "attention", "full", "offload"] = Field(
        "full", description="what a layer keeps for its backward pass; offload: its input only, in host memory"
    )
    attention: Literal["xla", "splash", "cudnn", "blocks"] = Field(
        "xla", description="splash: TPU kernels; cudnn: those of NVIDIA GPUs, in bfloat16; blocks: for CPUs"
    )
    unroll: bool = Field(
        False, description="the loop over layers written out: faster steps on GPUs, and longer to compile"
    )
    skip_limit: int = Field(
        5, ge=1, description="steps in a row without a finite loss and gradient, each skipped, before the run stops"
    )
    compilation_cache: str | None = Field(
        "~/.cache/derta_jax/xla", description="where compiled programs are kept for the next start; null for nowhere"
    )

    @model_validator(mode="after")
    def _one_length(self) -> "Train":
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("set one of train.steps and train.epochs, and leave the other null")
        return self


class Checkpoint(Section):
    """When to save, and how much to keep."""

    every_steps: int | None = Field(None, ge=1)
    every_minutes: float | None = Field(30.0, gt=0)
    keep: int = Field(2, ge=1, description="newest checkpoints that stay on disk")
    keep_best: int = Field(0, ge=0, description="checkpoints of the lowest held-out loss that stay as well")


class HeldOut(Section):
    """Examples that are not trained on, looked at during training."""

    path: str = Field(description="a directory written by `derta prepare`, or a JSONL file; on disk or `gs://…`")
    every_steps: int = Field(100, ge=1)
    batches: int | None = Field(None, ge=1, description="how many of train.batch_size rows; null for all")
    refusal_curves: bool = Field(False, description="p(refusal token) by position, in harmful and helpful answers")


class Watch(Section):
    """Where figures go beside the terminal, metrics.jsonl and TensorBoard."""

    wandb: str | None = Field(None, description="project at Weights & Biases; needs the extra `wandb`")


class Processes(Section):
    """How long the processes of a pod wait for each other, in seconds."""

    start_timeout: float = Field(120.0, gt=0, description="for all to start")
    heartbeat_timeout: float = Field(20.0, ge=5, description="before a silent process counts as dead")
    barrier_timeout: float = Field(600.0, gt=0, description="before one that does not come to a meeting fails the run")


class MeshShape(Section):
    """How many devices each mesh axis has."""

    data: int = Field(1, ge=1)
    fsdp: int = Field(-1, ge=-1, description="-1: all devices that the other axes leave")
    expert: int = Field(1, ge=1, description="devices that share out a mixture's experts")
    tensor: int = Field(1, ge=1)

    @field_validator("fsdp")
    @classmethod
    def _not_zero(cls, value: int) -> int:
        if value == 0:
            raise ValueError("must be a positive number of devices, or -1 for the rest")
        return value


class RunConfig(Section):
    """A whole run; what `derta train` reads."""

    model: Model
    data: Data
    train: Train
    objective: SerializeAsAny[Objective] = Field(default_factory=lambda: objective_class("derta")())
    lora: Lora | None = None
    frozen_adapters: dict[str, str] = Field(
        default_factory=dict, description="adapters by name, active while something else is trained (security vectors)"
    )
    checkpoint: Checkpoint = Checkpoint()
    held_out: HeldOut | None = None
    mesh: MeshShape = MeshShape()
    watch: Watch = Watch()
    processes: Processes = Processes()

    @field_validator("objective", mode="before")
    @classmethod
    def _objective_by_name(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return objective_class(value.get("name", "derta")).model_validate(value)

    @field_validator("frozen_adapters")
    @classmethod
    def _names_of_their_own(cls, adapters: dict[str, str]) -> dict[str, str]:
        if "default" in adapters:
            raise ValueError("`default` is the adapter that is trained: choose another name")
        return adapters

    @model_validator(mode="after")
    def _consistent(self) -> "RunConfig":
        self.objective.check(self)
        if self.checkpoint.keep_best and self.held_out is None:
            raise ValueError("checkpoint.keep_best ranks checkpoints by held-out loss: set held_out.path")
        return self


OBJECTIVES = "derta_jax.objectives"
"""The package whose modules are objectives, one each, and the entry-point group of those installed beside it."""


@functools.cache
def objective_names() -> tuple[str, ...]:
    """Of all objectives at hand."""
    package = importlib.import_module(OBJECTIVES)
    ours = [module.name for module in pkgutil.iter_modules(package.__path__)]
    theirs = [entry.name for entry in importlib.metadata.entry_points(group=OBJECTIVES)]
    return tuple(sorted({name for name in (*ours, *theirs) if _find_objective(name)}))


def objective_class(name: Any) -> type[Objective]:
    """The objective of that name: `OBJECTIVE` in a module of ours, or what an installed package offers.

    Raises `ValueError` naming those there are.
    """
    found = _find_objective(name) if isinstance(name, str) and name.isidentifier() else None
    if found is None:
        names = objective_names()
        raise ValueError(f"no objective {name!r} (there are {', '.join(names)}){did_you_mean(str(name), names)}")
    return found


def _find_objective(name: str) -> type[Objective] | None:
    if importlib.util.find_spec(f"{OBJECTIVES}.{name}"):
        return getattr(importlib.import_module(f"{OBJECTIVES}.{name}"), "OBJECTIVE", None)
    for entry in importlib.metadata.entry_points(group=OBJECTIVES, name=name):
        return cast(type[Objective], entry.load())
    return None


def dotted_keys(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every key of a config class, sections included: `train`, `train.steps`, …"""
    for name, field in section.model_fields.items():
        yield prefix + name
        inner = field.annotation
        if isinstance(inner, types.UnionType):
            inner = next((arg for arg in get_args(inner) if isinstance(arg, type)), None)
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from dotted_keys(inner, f"{prefix}{name}.")


def config_keys() -> list[str]:
    """Every dotted key of a run's config, those of all objectives included."""
    of_objectives = {f"objective.{key}" for name in objective_names() for key in objective_class(name).model_fields}
    keys = list(dotted_keys(RunConfig))
    return keys + sorted(of_objectives - {*keys})


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file and apply `key=value` overrides (values are YAML too).

    Raises `UserError` for a missing file, broken YAML, an unknown key or a wrong value, listing all of them.
    """
    return load_section(RunConfig, path, overrides, config_keys())


def load_section(section: type[S], path: str | Path, overrides: Sequence[str], known: Sequence[str]) -> S:
    """As `load_config`, of a section whose dotted keys are `known`."""
    raw = read_yaml(path)
    for override in overrides:
        _apply_override(raw, override, known)
    return validated(section, raw, path, known)


def read_yaml(path: str | Path, kind: str = "config") -> dict[str, Any]:
    """The keys and values of a YAML file. Raises `UserError` where there is none, or something else in it."""
    file = Path(path)
    if not file.is_file():
        siblings = [str(candidate) for candidate in file.parent.glob("*.y*ml")] if file.parent.is_dir() else []
        raise UserError(f"no {kind} file {path}{did_you_mean(str(path), siblings)}")
    try:
        raw = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(raw, dict):
        raise UserError(f"{path} must hold keys and values, not a {type(raw).__name__}")
    return raw


def validated(section: type[S], raw: dict[str, Any], path: str | Path, known: Sequence[str]) -> S:
    """What `read_yaml` gave, as a section. Raises `UserError` listing all problems; `known` are all dotted keys."""
    try:
        return section.model_validate(raw)
    except ValidationError as error:
        lines = [_explain(problem, known) for problem in error.errors()]
        raise UserError(f"{path}:\n" + "\n".join(f"  {line}" for line in lines)) from error


def dump_config(config: Section) -> str:
    """The resolved config as YAML; `load_config` reads it back."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _apply_override(raw: dict[str, Any], override: str, known: Sequence[str]) -> None:
    key, equals, value = override.partition("=")
    if not equals:
        raise UserError(f"override {override!r} is not key=value")
    if key not in known:
        raise UserError(f"unknown key {key!r} in override {override!r}{did_you_mean(key, known)}")
    *sections, last = key.split(".")
    for section in sections:
        if raw.get(section) is None:
            raw[section] = {}
        raw = raw[section]
        if not isinstance(raw, dict):
            raise UserError(f"override {override!r}: {section!r} is not a section")
    try:
        raw[last] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise UserError(f"override {override!r}: the value is not valid YAML") from error


def _explain(problem: Any, known: Sequence[str]) -> str:
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        return f"{key}: unknown key{did_you_mean(key, known)}"
    if problem["type"] == "missing":
        return f"{key}: missing"
    message = problem["msg"].removeprefix("Value error, ")
    if isinstance(problem["input"], dict | BaseModel):
        return f"{key}: {message}" if key else message
    return f"{key}: {message} (got {problem['input']!r})"
