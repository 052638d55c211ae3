"""Plans kept on disk: the same config on the same slice, under the same code and compiler, is compiled once."""

import dataclasses
import hashlib
import importlib.metadata
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from derta_jax.config import RunConfig
from derta_jax.models.config import ModelConfig

ELSEWHERE = {"train": ("output", "seed", "skip_limit", "compilation_cache"), "data": ("path", "template")}
"""Keys that do not reach the program."""

PRESENTING = ("command.py", "headers.py")
"""Modules that show plans, and make none."""

TRAINING = ("models", "objectives", "training", "planning")
"""Rooms whose code makes the train step."""

SECTIONS = ("train", "data", "objective", "lora", "mesh")


def directory() -> Path:
    """`$XDG_CACHE_HOME/derta_jax/plans`, usually `~/.cache/derta_jax/plans`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "derta_jax" / "plans"


def key(config: RunConfig, model: ModelConfig, question: Mapping[str, Any], rooms: Sequence[str] = TRAINING) -> str:
    """A digest of all that decides an answer: config, architecture, what is asked, and the code of `rooms`."""
    dump = config.model_dump(mode="json")
    for section, names in ELSEWHERE.items():
        for name in names:
            del dump[section][name]
    parts = {
        "config": {section: dump[section] for section in SECTIONS},
        "model": dataclasses.asdict(model),
        "question": dict(question),
        "versions": {name: _version(name) for name in ("jax", "jaxlib", "libtpu", "flax", "optax", "qwix")},
        "code": _code(rooms),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def read(digest: str) -> Any:
    """What was kept under a key; None where nothing was, or it cannot be read."""
    try:
        return json.loads((directory() / f"{digest}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def write(digest: str, answer: Any) -> None:
    """Keep an answer; where there is no place to keep it, it is not kept."""
    file = directory() / f"{digest}.json"
    unfinished = file.with_suffix(f".{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(json.dumps(answer), encoding="utf-8")
        unfinished.replace(file)
    except OSError:
        return


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _code(rooms: Sequence[str]) -> str:
    package = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for room in rooms:
        for file in sorted((package / room).rglob("*.py")):
            if file.name in PRESENTING:
                continue
            digest.update(str(file.relative_to(package)).encode() + file.read_bytes())
    return digest.hexdigest()
