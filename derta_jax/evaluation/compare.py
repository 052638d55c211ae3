"""Several models through the same cases, side by side: the results, and what the report shows of them."""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from derta_jax.evaluation.attacks import Case, Question
from derta_jax.evaluation.evaluate import (
    Helpful,
    Judged,
    answer_cases,
    example_answer,
    figures_of,
    refusal_curve,
    refusal_positions,
    write_answers,
)
from derta_jax.evaluation.judging.judge import Judge
from derta_jax.evaluation.subject import Generation, Subject, open_subject

EXAMPLES_PER_SET = 2


def compare(
    models: Mapping[str, str | Path],
    cases_of: Callable[[Subject], Iterable[Case]],
    judge: Judge,
    generation: Generation,
    harmful: Sequence[Question],
    benign: Sequence[Question],
    directory: Path,
    console: Console,
    helpful: Helpful = lambda question, response: False,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Ask every model every case; returns `results.json`'s object and the report's details.

    p(refusal) is followed along the `harmful` and the `response` answers of the two lists of questions. Every answer
    is written to `directory/answers/NAME.jsonl`.
    """
    results: dict[str, Any] = {"judge": {"name": judge.name, "version": judge.version}, "models": {}}
    curves: dict[str, dict[str, Any]] = {"harmful": {}, "benign": {}}
    positions: dict[str, Any] = {}
    examples: dict[str, dict[str, Any]] = {}
    for name, path in models.items():
        subject = open_subject(path, generation, console)
        curves["harmful"][name] = refusal_curve(subject, harmful, "harmful", generation.batch_size)
        curves["benign"][name] = refusal_curve(subject, benign, "response", generation.batch_size)
        cases = list(cases_of(subject))
        console.print(f"{name}: {len(cases):,} prompts", highlight=False)
        with progress_bar(console) as bar:
            task = bar.add_task(name, total=len(cases))
            judged = answer_cases(
                subject,
                cases,
                judge,
                generation.max_new_tokens,
                generation.batch_size,
                helpful,
                progress=functools.partial(advance, bar, task),
            )
        results["models"][name] = figures_of(judged)
        positions[name] = refusal_positions(judged)
        write_answers(judged, directory / "answers" / f"{name}.jsonl")
        _collect_examples(examples, name, subject, judged)
    return results, {"refusal_positions": positions, "curves": curves, "examples": list(examples.values())}


def _collect_examples(
    examples: dict[str, dict[str, Any]], name: str, subject: Subject, judged: Sequence[Judged]
) -> None:
    """Add a model's answers to the first cases of every attack and set, keyed so that models stand side by side."""
    shown: dict[str, int] = {}
    for item in judged:
        case = item.case
        shown[case.name] = shown.get(case.name, 0) + 1
        if shown[case.name] > EXAMPLES_PER_SET:
            continue
        title = f"{case.name} · {case.question['id']}"
        blank = {"title": title, "prompt": case.question["prompt"], "prefill": case.prefill, "answers": {}}
        examples.setdefault(title, blank)["answers"][name] = example_answer(subject, item)


def progress_bar(console: Console) -> Progress:
    """A bar with an ETA in a terminal, nothing in a log."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(
        *columns,
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def advance(bar: Progress, task: TaskID, completed: int) -> None:
    """Tell a bar how much is done."""
    bar.update(task, completed=completed)
