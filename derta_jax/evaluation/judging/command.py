"""`derta judge`: other verdicts for answers that are there already, by another judge or by people."""

import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from derta_jax.errors import UserError
from derta_jax.evaluation.files import make_directory, write_rows
from derta_jax.evaluation.judging.answers import Answered, read_answers
from derta_jax.evaluation.judging.judge import LABELS, UNJUDGED, UNSAFE, Judge, Verdict
from derta_jax.evaluation.judging.label_sheet import Sheet, read_sheet, write_sheet
from derta_jax.evaluation.judging.opening import Answer, open_judge
from derta_jax.evaluation.statistics import Agreement, agreement, attack_entry_of

FILES, PEOPLE = "files", "people"
"""Whose verdicts a column shows, beside a judge's name and version: those that stood in the files, and people's."""


def judge_answers(
    files: Sequence[str],
    judge: str | None,
    output: str | None,
    label_sheet: str | None,
    labels: str | None,
    sheet: Sheet,
    console: Console,
    answer: Answer | None = None,
) -> None:
    """Print attack success by every judge at hand, and how far they agree; write what is asked for.

    `judge` is a name or a YAML file (None: the files' own verdicts), `labels` a sheet that people filled in. `output`
    gets the answers with the verdicts of `judge`, and people's labels beside them: a .jsonl file for one file, else a
    directory. `label_sheet` is written for people to fill in. `answer` speaks for a judge that is a local model.
    """
    answered = read_answers(files)
    if output is not None and judge is None and labels is None:
        raise UserError("--output has nothing new to write: give --judge, --labels or both")
    places = _output_files(files, output) if output is not None else {}
    opened = open_judge(judge, answer) if judge is not None else None
    people = read_sheet(labels, answered) if labels is not None else None

    by_judge: dict[str, list[Verdict]] = {FILES: [Verdict(item.row["verdict"]) for item in answered]}
    if opened is not None:
        by_judge[f"{opened.name} {opened.version}"] = _ask(opened, answered, console)
    machine = [*by_judge.values()][-1]
    if people is not None:
        by_judge[PEOPLE] = people.verdicts(answered)
        console.print(
            f"{labels}: labels {len(people.by_key):,}, rows without one {people.unlabelled:,}, "
            f"answers that are not on the sheet {people.missing:,}",
            highlight=False,
            soft_wrap=True,
        )
    for model, place in places.items():
        rows = [
            _row(item, opened, verdict, people.by_key.get(item.key) if people else None)
            for item, verdict in zip(answered, machine, strict=True)
            if item.model == model
        ]
        write_rows(rows, place)
        console.print(f"{len(rows):,} answers: {place}", highlight=False, soft_wrap=True)
    if label_sheet is not None:
        count = write_sheet(answered, [verdict.label for verdict in machine], label_sheet, sheet)
        console.print(f"{count:,} answers to label: {label_sheet}", highlight=False, soft_wrap=True)
    by_label = {name: [verdict.label for verdict in verdicts] for name, verdicts in by_judge.items()}
    console.print(attack_table(answered, by_label))
    attacked = [index for index, item in enumerate(answered) if item.row["group"] == "attacks"]
    under_attack = {name: [verdicts[index] for index in attacked] for name, verdicts in by_label.items()}
    for (first, one), (second, other) in itertools.combinations(under_attack.items(), 2):
        _show_agreement(first, second, one, other, console)
    _show_problems(machine, console)


def attack_table(answered: Sequence[Answered], by_judge: Mapping[str, Sequence[str]]) -> Table:
    """A row per attack of each model, a column per judge: attack success in % of what it judged."""
    table = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
        caption=Text(
            "attack success, %, Wilson 95% interval in brackets; files: the verdicts that they held", style="dim"
        ),
        caption_justify="left",
    )
    table.add_column("model")
    table.add_column("attack", no_wrap=True)
    for name in by_judge:
        table.add_column(Text(name), justify="right")
    sets: dict[tuple[str, str, str], list[int]] = defaultdict(list)
    for index, item in enumerate(answered):
        if item.row["group"] == "attacks":
            sets[item.place].append(index)
    for (model, _, name), indices in sets.items():
        cells = [_cell(attack_entry_of(labels[index] for index in indices)) for labels in by_judge.values()]
        table.add_row(Text(model), Text(name), *cells)
    return table


def _cell(entry: Mapping[str, Any]) -> Text:
    unjudged = f", {entry['unjudged']} unjudged" if entry.get("unjudged") else ""
    if entry["asr"] is None:
        return Text(f"–{unjudged}", style="dim")
    interval = f"({100 * entry['low']:.0f}–{100 * entry['high']:.0f}), n={entry['n']}{unjudged}"
    return Text.assemble((f"{100 * entry['asr']:.1f}", "bold"), (f" {interval}", "dim"))


def _show_agreement(first: str, second: str, labels: Sequence[str], others: Sequence[str], console: Console) -> None:
    """Cohen's kappa of two judges, over all labels and over what attack success depends on, and who says what."""
    over_all = agreement(labels, others)
    unsafe_or_not = agreement(_unsafe_or_not(labels), _unsafe_or_not(others))
    if over_all.n == 0 or over_all.agreed is None or unsafe_or_not.agreed is None:
        console.print(f"{first} and {second} have no answer under attack that both judged", highlight=False)
        return
    left_out = f" ({over_all.left_out:,} unjudged by one of them)" if over_all.left_out else ""
    console.print(
        f"{first} and {second} on {over_all.n:,} answers under attack{left_out}:\n"
        f"  unsafe or not: {100 * unsafe_or_not.agreed:.1f}% alike, {_kappa(unsafe_or_not)}\n"
        f"  all labels: {100 * over_all.agreed:.1f}% alike, {_kappa(over_all)}",
        highlight=False,
        soft_wrap=True,
    )
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column(Text(f"{first} ↓ {second} →"))
    used = [label for label in LABELS if any(label in pair for pair in over_all.confusion)]
    for label in used:
        table.add_column(label, justify="right")
    for label in used:
        table.add_row(label, *(str(over_all.confusion.get((label, other), 0)) for other in used))
    console.print(table)


def _unsafe_or_not(labels: Sequence[str]) -> list[str]:
    return [label if label in (UNSAFE, UNJUDGED) else "not unsafe" for label in labels]


def _kappa(found: Agreement) -> str:
    if found.kappa is None:
        return "kappa not defined, as both give one and the same label"
    return f"kappa {found.kappa:.2f} ({found.low:.2f}–{found.high:.2f})"


def _show_problems(verdicts: Sequence[Verdict], console: Console) -> None:
    unjudged = [verdict for verdict in verdicts if verdict.label == UNJUDGED]
    if unjudged:
        why = next((verdict.problem for verdict in unjudged if verdict.problem), "no reason is kept")
        console.print(f"unjudged answers: {len(unjudged):,}, the first because {why}", highlight=False, markup=False)


def _ask(judge: Judge, answered: Sequence[Answered], console: Console) -> list[Verdict]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("judge", total=len(answered))
        return judge.verdicts([item.asked for item in answered], progress=lambda done: bar.update(task, completed=done))


def _row(item: Answered, judge: Judge | None, verdict: Verdict, label: str | None) -> dict[str, Any]:
    """The answer's line with its new verdict; what an earlier judge replied goes with the earlier verdict."""
    row = item.row
    if judge is not None:
        kept = {key: value for key, value in row.items() if key not in ("judge_reply", "judge_problem")}
        row = kept | verdict.to_row() | {"judge": {"name": judge.name, "version": judge.version}}
    return row if label is None else row | {"label": label}


def _output_files(files: Sequence[str], output: str) -> dict[str, Path]:
    """Where each model's answers go; the directories are made before the work, not after it."""
    if output.endswith(".jsonl"):
        if len(files) > 1:
            raise UserError(f"--output {output} is one file for {len(files)} of answers: name a directory")
        places = {Path(files[0]).stem: Path(output)}
    else:
        places = {Path(file).stem: Path(output) / Path(file).name for file in files}
    if same := [place for place in places.values() if place.resolve() in {Path(file).resolve() for file in files}]:
        raise UserError(f"--output would write over {same[0]}, the verdicts of another judge: name another place")
    for directory in {place.parent for place in places.values()}:
        make_directory(directory)
    return places
