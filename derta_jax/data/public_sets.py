"""Public sets of harmful questions with safe and harmful answers, as triples (`derta prepare --from NAME`).

What a file must hold is known from the sets' cards and the code that reads them; no row of them is in this repository.
"""

import dataclasses
import gzip
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from derta_jax.data.examples import Example, Problems, Triple, read_examples
from derta_jax.errors import UserError, did_you_mean

Record = dict[str, Any]
Answered = tuple[str, str, bool, str]
"""A prompt, an answer, whether it is safe, and the kind of harm if it is not."""


@dataclasses.dataclass(frozen=True)
class PublicSet:
    """`fields` are those that a record must have, with their JSON types; `answers` what a record says."""

    url: str
    licence: str
    fields: Mapping[str, type]
    answers: Callable[[Record], list[Answered]]


def _pku(record: Record) -> list[Answered]:
    return [
        (
            record["prompt"],
            record[f"response_{i}"],
            record[f"is_response_{i}_safe"],
            _first_true(record.get(f"response_{i}_harm_category")),
        )
        for i in (0, 1)
    ]


def _beavertails(record: Record) -> list[Answered]:
    return [(record["prompt"], record["response"], record["is_safe"], _first_true(record["category"]))]


def _circuit_breakers(record: Record) -> list[Answered]:
    category = str(record.get("category") or "")
    return [
        (record["prompt"], record["llama3_output"], True, ""),
        (record["prompt"], record["output"], False, category),
    ]


def _lat(record: Record) -> list[Answered]:
    return [(record["prompt"], record["chosen"], True, ""), (record["prompt"], record["rejected"], False, "")]


def _first_true(categories: object) -> str:
    return next((name for name, holds in categories.items() if holds), "") if isinstance(categories, dict) else ""


SETS = {
    "pku-saferlhf": PublicSet(
        "https://huggingface.co/datasets/PKU-Alignment/PKU-SafeRLHF",
        "CC BY-NC 4.0",
        {
            "prompt": str,
            "response_0": str,
            "response_1": str,
            "is_response_0_safe": bool,
            "is_response_1_safe": bool,
        },
        _pku,
    ),
    "beavertails": PublicSet(
        "https://huggingface.co/datasets/PKU-Alignment/BeaverTails",
        "CC BY-NC 4.0",
        {"prompt": str, "response": str, "category": dict, "is_safe": bool},
        _beavertails,
    ),
    "circuit-breakers": PublicSet(
        "https://github.com/GraySwanAI/circuit-breakers",
        "MIT",
        {"prompt": str, "output": str, "llama3_output": str},
        _circuit_breakers,
    ),
    "lat": PublicSet(
        "https://huggingface.co/datasets/LLM-LAT/harmful-dataset",
        "see its card",
        {"prompt": str, "chosen": str, "rejected": str},
        _lat,
    ),
}
"""By name. `derta`, the authors' own files, is read as it is (`data/examples.py`)."""

NAMES = (*SETS, "derta")


@dataclasses.dataclass(frozen=True)
class Conversion:
    """Examples in file order, and what was left out, by reason."""

    examples: list[Example]
    left_out: dict[str, int]


def read_public_set(name: str, paths: Sequence[str | Path], limit: int | None = None) -> Conversion:
    """Every safe answer to a prompt beside a harmful one to the same prompt, each used once.

    `limit` keeps so many triples, chosen by the hash of what they say, so that the choice is the same on any machine.
    Raises `UserError` that lists `file:line: field: problem` for every record that is not of the set.
    """
    if limit is not None and limit < 1:
        raise UserError(f"--limit {limit}: at least 1")
    if name == "derta":
        return Conversion(read_examples(paths), {})
    left_out: Counter[str] = Counter()
    by_prompt: dict[str, dict[bool, list[tuple[str, str]]]] = {}
    for record in _valid_records(SETS[name], paths):
        for prompt, answer, safe, category in SETS[name].answers(record):
            if not prompt.strip() or not answer.strip():
                left_out["an empty prompt or answer"] += 1
                continue
            answers = by_prompt.setdefault(prompt.strip(), {True: [], False: []})[bool(safe)]
            if answer.strip() in (text for text, _ in answers):
                left_out["the same answer to the same prompt again"] += 1
            else:
                answers.append((answer.strip(), category))
    triples = [triple for prompt, answers in by_prompt.items() for triple in _pair(name, prompt, answers, left_out)]
    if limit is not None and len(triples) > limit:
        left_out[f"more than {limit:,} triples (--limit)"] += len(triples) - limit
        chosen = set(sorted(triple.id for triple in triples)[:limit])
        triples = [triple for triple in triples if triple.id in chosen]
    if not triples:
        raise UserError(f"no triples in {', '.join(map(str, paths))}: no prompt has both a safe and a harmful answer")
    return Conversion(list(triples), dict(left_out))


def _pair(
    name: str, prompt: str, answers: Mapping[bool, list[tuple[str, str]]], left_out: Counter[str]
) -> Iterator[Triple]:
    safe, harmful = answers[True], answers[False]
    if surplus := abs(len(safe) - len(harmful)):
        left_out[f"{'safe' if len(safe) > len(harmful) else 'harmful'} answers without a counterpart"] += surplus
    for (good, _), (bad, category) in zip(safe, harmful, strict=False):
        digest = hashlib.sha256("\0".join((prompt, good, bad)).encode()).hexdigest()[:16]
        yield Triple(f"{name}-{digest}", prompt, good, bad, source=name, category=category)


def _valid_records(public_set: PublicSet, paths: Iterable[str | Path]) -> Iterator[Record]:
    problems = Problems()
    for place, record in _records(paths, problems):
        wrong = [problem for field in public_set.fields if (problem := _check(public_set, record, field))]
        if wrong:
            problems.add(f"{place}: {'; '.join(wrong)}")
        else:
            yield record
    problems.raise_any()


def _check(public_set: PublicSet, record: Record, field: str) -> str | None:
    wanted = public_set.fields[field]
    if field not in record:
        return f"{field}: missing{did_you_mean(field, record.keys() - public_set.fields.keys())}"
    if isinstance(record[field], wanted):
        return None
    return f"{field}: must be {({str: 'a string', bool: 'true or false', dict: 'an object'})[wanted]}"


def _records(paths: Iterable[str | Path], problems: Problems) -> Iterator[tuple[str, Record]]:
    """Objects with their `file:line`: JSON lines, or one array (`file[index]`), gzipped or not."""
    for path in map(Path, paths):
        if not path.is_file():
            raise UserError(f"no data file {path}")
        if path.suffix == ".parquet":
            raise UserError(f"{path}: write it as JSON lines first, as with `datasets`: load_dataset(…).to_json(…)")
        try:
            text = (gzip.decompress if path.suffix == ".gz" else bytes)(path.read_bytes()).decode("utf-8-sig")
        except (OSError, EOFError, UnicodeDecodeError) as error:
            raise UserError(f"{path} cannot be read: {error}") from error
        if text.lstrip().startswith("["):
            try:
                found = [(f"{path}[{i}]", record) for i, record in enumerate(json.loads(text))]
            except json.JSONDecodeError as error:
                raise UserError(
                    f"{path}:{error.lineno}: not valid JSON at column {error.colno}: {error.msg}"
                ) from error
        else:
            found = list(_lines(path, text, problems))
        for place, record in found:
            if isinstance(record, dict):
                yield place, record
            else:
                problems.add(f"{place}: must be a JSON object")


def _lines(path: Path, text: str, problems: Problems) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            yield f"{path}:{number}", json.loads(line)
        except json.JSONDecodeError as error:
            problems.add(f"{path}:{number}: not valid JSON at column {error.colno}: {error.msg}")
