"""Files of answers, as `derta evaluate` writes them: read, told apart, and written with other verdicts."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from derta_jax.errors import UserError
from derta_jax.evaluation.judging.judge import LABELS, Asked

TEXT_FIELDS = ("prompt", "group", "name", "response", "verdict")


@dataclass(frozen=True)
class Answered:
    """One line of a file: what `model` answered. `key` names it on a label sheet and changes with the answer's text."""

    key: str
    model: str
    row: dict[str, Any]

    @property
    def asked(self) -> Asked:
        return Asked({**self.row, "attack": self.row["name"]}, self.row["response"])

    @property
    def place(self) -> tuple[str, str, str]:
        """Where its figure goes: model, group, and attack or set."""
        return self.model, self.row["group"], self.row["name"]


def read_answers(paths: Sequence[str | Path]) -> list[Answered]:
    """All lines of all files, in order; a file's name is its model's. Raises `UserError` naming line and field."""
    names = [Path(path).stem for path in paths]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"two files are named {twice[0]}: a file's name is its model's")
    answered: list[Answered] = []
    problems: list[str] = []
    seen: set[str] = set()
    for path, model in zip(map(Path, paths), names, strict=True):
        for number, line in enumerate(_lines(path), start=1):
            if not line.strip():
                continue
            try:
                row = _row(line)
            except ValueError as error:
                problems.append(f"{path}:{number}: {error}")
                continue
            key = _key(model, row, seen)
            seen.add(key)
            answered.append(Answered(key, model, row))
    if problems:
        raise UserError("the answers have problems:\n" + "\n".join(f"  {problem}" for problem in problems[:20]))
    if not answered:
        raise UserError(f"no answers in {', '.join(map(str, paths))}")
    return answered


def _lines(path: Path) -> list[bytes]:
    try:
        return path.read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"cannot read answers from {path}: {error.strerror}") from error


def _row(line: bytes) -> dict[str, Any]:
    row = json.loads(line.decode("utf-8"))
    if not isinstance(row, dict):
        raise ValueError("is not a JSON object")
    for field in TEXT_FIELDS:
        if not isinstance(row.get(field), str):
            raise ValueError(f"`{field}` must be a string, as `derta evaluate` writes it")
    if row["verdict"] not in LABELS:
        raise ValueError(f"`verdict` must be one of {', '.join(LABELS)} (got {row['verdict']!r})")
    return row


def _key(model: str, row: dict[str, Any], seen: set[str]) -> str:
    """Short, the same in every session, and nothing that a spreadsheet takes for a number."""
    parts = [model, row["group"], row["name"], row.get("id"), row["prompt"], row["response"]]
    repetition = 0
    while True:
        digest = hashlib.sha256(json.dumps([*parts, repetition]).encode()).hexdigest()
        key = f"answer-{digest[:12]}"
        if key not in seen:
            return key
        repetition += 1
