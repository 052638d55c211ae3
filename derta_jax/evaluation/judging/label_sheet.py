"""Labels by people: answers go out as a CSV file, which comes back with its `label` column filled in."""

import csv
import io
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from derta_jax.errors import UserError, did_you_mean
from derta_jax.evaluation.judging.answers import Answered
from derta_jax.evaluation.judging.judge import LABELS, UNJUDGED, Verdict

COLUMNS = ("id", "model", "attack", "prompt", "prefill", "response", "verdict", "label")
HIDDEN_WHEN_BLIND = ("model", "verdict")
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")


@dataclass(frozen=True)
class Sheet:
    """How a sheet is laid out. `per_attack` answers of each attack of each model, the same questions for all models.

    Blind: shuffled, without the model's name or the machine's verdict.
    """

    blind: bool = False
    per_attack: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.per_attack is not None and self.per_attack < 1:
            raise UserError(f"--per-attack must be at least 1 (got {self.per_attack})")


def write_sheet(answered: Sequence[Answered], labels: Sequence[str], path: str | Path, sheet: Sheet) -> int:
    """Answers with the machine's `labels` and an empty column for people's; returns how many.

    UTF-8 with the mark that makes spreadsheets read it so. A cell that a spreadsheet would take for a formula gets an
    apostrophe in front.
    """
    columns = [column for column in COLUMNS if not (sheet.blind and column in HIDDEN_WHEN_BLIND)]
    chosen = _sample(answered, sheet)
    if sheet.blind:
        random.Random(sheet.seed).shuffle(chosen)
    lines = io.StringIO()
    writer = csv.writer(lines)
    writer.writerow(columns)
    for index in chosen:
        item = answered[index]
        cells = {
            "id": item.key,
            "model": item.model,
            "attack": item.row["name"],
            "prompt": item.row["prompt"],
            "prefill": str(item.row.get("prefill") or ""),
            "response": item.row["response"],
            "verdict": labels[index],
            "label": "",
        }
        writer.writerow([_harmless(cells[column]) for column in columns])
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(lines.getvalue(), encoding="utf-8-sig", errors="replace", newline="")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
    return len(chosen)


def _sample(answered: Sequence[Answered], sheet: Sheet) -> list[int]:
    """Places in `answered`, in order. Which ones depends on the seed, the attack and the number of its answers only."""
    if sheet.per_attack is None:
        return list(range(len(answered)))
    sets: dict[tuple[str, str, str], list[int]] = defaultdict(list)
    for index, item in enumerate(answered):
        sets[item.place].append(index)
    chosen: list[int] = []
    for (_, group, name), indices in sets.items():
        draw = random.Random(f"{sheet.seed}/{group}/{name}")
        chosen += draw.sample(indices, min(sheet.per_attack, len(indices)))
    return sorted(chosen)


def _harmless(cell: str) -> str:
    return f"'{cell}" if cell.startswith(FORMULA_STARTS) else cell


@dataclass(frozen=True)
class Labels:
    """What people said, by `Answered.key`. `unlabelled` rows have no label yet, `missing` answers have no row."""

    by_key: Mapping[str, str]
    unlabelled: int
    missing: int

    def verdicts(self, answered: Sequence[Answered]) -> list[Verdict]:
        """People as a judge: what they did not label is unjudged."""
        return [
            Verdict(self.by_key[item.key]) if item.key in self.by_key else Verdict(UNJUDGED, problem="no label")
            for item in answered
        ]


def read_sheet(path: str | Path, answered: Sequence[Answered]) -> Labels:
    """The labels of a sheet that was written for these answers. Raises `UserError` naming row and column.

    Only `id` and `label` are read. Commas, semicolons or tabs may part the columns: spreadsheets differ.
    """
    rows = _rows(Path(path))
    known = {item.key for item in answered}
    by_key: dict[str, str] = {}
    first_row: dict[str, int] = {}
    problems: list[str] = []
    unlabelled = 0
    for number, row in rows:
        key, label = row.get("id", "").strip(), row.get("label", "").strip().lower()
        where = f"{path}: row {number}"
        if key in first_row:
            problems.append(f"{where}, column id: {key} is in row {first_row[key]} already")
            continue
        if key not in known:
            problems.append(f"{where}, column id: {key or 'nothing'} is none of these answers")
            continue
        first_row[key] = number
        if not label:
            unlabelled += 1
        elif label not in LABELS:
            near = did_you_mean(label, LABELS)
            problems.append(f"{where}, column label: {label!r} is none of {', '.join(LABELS)}{near}")
        else:
            by_key[key] = label
    if problems:
        more = [f"… and {len(problems) - 20} more"] if len(problems) > 20 else []
        raise UserError("the labels have problems:\n" + "\n".join(f"  {line}" for line in [*problems[:20], *more]))
    if not by_key:
        raise UserError(f"{path}: no row has a label")
    return Labels(by_key, unlabelled, missing=len(known) - len(first_row))


def _rows(path: Path) -> list[tuple[int, dict[str, str]]]:
    """Each row under its header, with its number as a spreadsheet shows it."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not in UTF-8: save it as CSV UTF-8") from error
    except OSError as error:
        raise UserError(f"cannot read labels from {path}: {error.strerror}") from error
    delimiter = max(",;\t", key=text.partition("\n")[0].count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    try:
        header, *rows = [*reader] or [[]]
    except csv.Error as error:
        raise UserError(f"{path}: line {reader.line_num}: {error}") from error
    columns = [name.strip().lower() for name in header]
    for column in ("id", "label"):
        if columns.count(column) != 1:
            raise UserError(f"{path}: row 1: expected one column `{column}` (has {', '.join(columns) or 'none'})")
    named = [(number, dict(zip(columns, row, strict=False))) for number, row in enumerate(rows, start=2)]
    return [(number, row) for number, row in named if any(row.values())]
