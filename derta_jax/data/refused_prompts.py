"""Prompts that may not be trained on: those that a model will be evaluated with."""

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from derta_jax.data.examples import AuthorsRow, Example
from derta_jax.errors import UserError

DIGEST = re.compile(r"[0-9a-f]{64}")
AUTHORS_PROMPT = re.compile(r"^\[INST\]\s*(.*?)\s*\[\\?/?INST\]", re.DOTALL)
QUESTION_FIELDS = ("prompt", "question", "goal", "behavior", "Goal", "Behavior")
MAX_SHOWN = 10


def prompt_hash(prompt: str) -> str:
    """SHA-256 of a prompt without its case, punctuation and spacing, so that a list of them can be passed on."""
    return hashlib.sha256(" ".join(re.findall(r"\w+", prompt.casefold())).encode()).hexdigest()


def read_refused(paths: Iterable[str | Path]) -> set[str]:
    """The hashes of a list: a line is a hash, a JSON object with a prompt, or a prompt. Raises `UserError`."""
    refused: set[str] = set()
    for path in map(Path, paths):
        if not path.is_file():
            raise UserError(f"no list of prompts {path}")
        for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), start=1):
            line = line.strip()
            if not line or line.startswith("#"):
                continue
            refused.add(line if DIGEST.fullmatch(line) else prompt_hash(_prompt_in(line, f"{path}:{number}")))
    return refused


def _prompt_in(line: str, place: str) -> str:
    if not line.startswith("{"):
        return line
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{place}: not valid JSON at column {error.colno}: {error.msg}") from error
    prompt = next((record[field] for field in QUESTION_FIELDS if isinstance(record.get(field), str)), None)
    if prompt is None:
        raise UserError(f"{place}: has none of {', '.join(QUESTION_FIELDS)}")
    return str(prompt)


def prompt_of(example: Example) -> str:
    """What was asked; of the authors' rows what stands between the marks of their template."""
    if isinstance(example, AuthorsRow):
        match = AUTHORS_PROMPT.match(example.prefix)
        return match[1] if match else example.prefix
    return example.prompt


def allowed(examples: Sequence[Example], refused: set[str]) -> list[Example]:
    """Those whose prompts are on no list."""
    return [example for example in examples if prompt_hash(prompt_of(example)) not in refused]


def refuse_any(examples: Sequence[Example], refused: set[str]) -> None:
    """Raises `UserError` that names the examples whose prompts are on a list."""
    kept = {id(example) for example in allowed(examples, refused)}
    found = [example.id for example in examples if id(example) not in kept]
    if found:
        more = f" and {len(found) - MAX_SHOWN:,} more" if len(found) > MAX_SHOWN else ""
        raise UserError(
            f"{len(found):,} examples ask what the evaluation asks: {', '.join(found[:MAX_SHOWN])}{more}\n"
            "--leave-out in place of --refuse goes on without them"
        )
