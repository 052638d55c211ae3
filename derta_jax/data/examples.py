"""The three input formats, and their validation: every problem with its file, line and field, none half-read."""

import codecs
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from derta_jax.errors import UserError, did_you_mean

MAX_PROBLEMS_SHOWN = 20


@dataclasses.dataclass(frozen=True)
class Triple:
    """A harmful question with a safe and a harmful answer: what recipes make rows of."""

    id: str
    prompt: str
    safe: str
    harmful: str
    source: str = ""
    category: str = ""


@dataclasses.dataclass(frozen=True)
class Helpful:
    """An ordinary question with its answer, and for DPO maybe a worse one. Category `lookalike`: it looks harmful."""

    id: str
    prompt: str
    response: str
    rejected: str = ""
    category: str = ""


@dataclasses.dataclass(frozen=True)
class AuthorsRow:
    """A finished row of the DeRTa authors' files: templated `prefix`, `text` to learn; `safe: "true"` means RTO."""

    id: str
    prefix: str
    text: str
    rto: bool


Example = Triple | Helpful | AuthorsRow

FORMATS = {
    "triple": ("id", "prompt", "safe", "harmful"),
    "helpful": ("id", "prompt", "response"),
    "authors": ("prefix", "text", "safe"),
}
OPTIONAL = {"triple": ("source", "category"), "helpful": ("source", "category", "rejected"), "authors": ("id",)}
MAY_BE_EMPTY = ("prefix", "source", "category", "rejected")


class Problems:
    """What is wrong with a user's files, collected to be told all at once."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def add(self, problem: str) -> None:
        """Keep one, with its place."""
        self.found.append(problem)

    def raise_any(self) -> None:
        """Raises `UserError` that shows the first of them, if there are any."""
        if not self.found:
            return
        shown = self.found[:MAX_PROBLEMS_SHOWN]
        if len(self.found) > len(shown):
            shown.append(f"… and {len(self.found) - len(shown)} more")
        raise UserError("the data has problems:\n" + "\n".join(f"  {problem}" for problem in shown))


def read_examples(paths: Sequence[str | Path]) -> list[Example]:
    """Read JSONL files, each line in any of the three formats; blank lines are passed over.

    Raises `UserError` that lists `file:line: field: problem` for every bad line and for ids used twice.
    """
    examples: list[Example] = []
    problems = Problems()
    seen: dict[str, str] = {}
    for path in map(Path, paths):
        if not path.is_file():
            raise UserError(f"no data file {path}")
        for number, line in enumerate(path.read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n"), start=1):
            if not line.strip():
                continue
            place = f"{path}:{number}"
            try:
                example = parse_example(line, default_id=f"{path.stem}-{number}")
            except ValueError as error:
                problems.add(f"{place}: {error}")
                continue
            if example.id in seen:
                problems.add(f"{place}: id: {example.id!r} is already used at {seen[example.id]}")
            seen.setdefault(example.id, place)
            examples.append(example)
    problems.raise_any()
    if not examples:
        raise UserError(f"no examples in {', '.join(map(str, paths))}")
    return examples


def parse_example(line: bytes, default_id: str) -> Example:
    """One JSON line → an example; `default_id` names the authors' rows, which have none. Raises `ValueError`."""
    try:
        raw = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start + 1} of the line is not UTF-8") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON at column {error.colno}: {error.msg}") from error
    if not isinstance(raw, dict):
        raise ValueError(f"must be a JSON object, not {_json_type(raw)}")
    kind = _detect_format(raw)
    problems = [problem for field in FORMATS[kind] if (problem := _check_field(raw, field))]
    problems += [problem for field in OPTIONAL[kind] if field in raw and (problem := _check_field(raw, field))]
    if kind == "authors" and not problems and raw["safe"] not in ("true", "false"):
        problems.append(f'safe: must be "true" (an RTO row) or "false" (not {raw["safe"]!r})')
    if problems:
        raise ValueError("; ".join(problems))
    if kind == "triple":
        return Triple(**{name: raw.get(name, "") for name in FORMATS["triple"] + OPTIONAL["triple"]})
    if kind == "helpful":
        return Helpful(**{name: raw.get(name, "") for name in (*FORMATS["helpful"], "rejected", "category")})
    return AuthorsRow(raw.get("id", default_id), raw["prefix"], raw["text"], rto=raw["safe"] == "true")


def _detect_format(raw: dict[str, Any]) -> str:
    if "prefix" in raw or "text" in raw:
        return "authors"
    if "response" in raw:
        return "helpful"
    if "safe" in raw or "harmful" in raw:
        return "triple"
    known = sorted({field for fields in FORMATS.values() for field in fields})
    hints = [f"unknown field {field!r}{did_you_mean(field, known)}" for field in raw if field not in known]
    expected = ", or ".join("{" + ", ".join(fields) + "}" for fields in FORMATS.values())
    raise ValueError("; ".join([f"is neither {expected}", *hints]))


def _check_field(raw: dict[str, Any], field: str) -> str | None:
    if field not in raw:
        others = [name for name in raw if all(name not in fields for fields in FORMATS.values())]
        near = did_you_mean(field, others).replace("did you mean", "is it spelt")
        return f"{field}: missing{near}"
    if not isinstance(raw[field], str):
        return f"{field}: must be a string, not {_json_type(raw[field])}"
    if not raw[field].strip() and field not in MAY_BE_EMPTY:
        return f"{field}: is empty"
    if any("\ud800" <= char <= "\udfff" for char in raw[field]):
        return f"{field}: holds half of a surrogate pair (\\ud800 to \\udfff), which is not text"
    return None


def _json_type(value: Any) -> str:
    names = {dict: "an object", list: "an array", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else "a string")
