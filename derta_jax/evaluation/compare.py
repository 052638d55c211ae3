"""Several models through the same cases, side by side: the results, and what the report shows of them."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
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

from derta_jax.config import Data, Objective
from derta_jax.data.template import Template
from derta_jax.errors import UserError
from derta_jax.evaluation.attacks import Case, Question
from derta_jax.evaluation.evaluate import (
    Helpful,
    Judged,
    Subject,
    answer_cases,
    example_answer,
    figures_of,
    refusal_curve,
    refusal_positions,
    write_answers,
)
from derta_jax.evaluation.judging.judge import Judge
from derta_jax.interop.tokenizer import load_tokenizer
from derta_jax.models.decoder import Decoder
from derta_jax.training.mesh import single_device_mesh
from derta_jax.training.progress import load_with_progress
from derta_jax.training.restore import find_model

EXAMPLES_PER_SET = 2


@dataclasses.dataclass(frozen=True)
class Generation:
    """How answers are made, as the command line says."""

    max_new_tokens: int
    batch_size: int
    template: str | None
    dtype: str

    def __post_init__(self) -> None:
        for option, value in (("--max-new-tokens", self.max_new_tokens), ("--batch-size", self.batch_size)):
            if value < 1:
                raise UserError(f"{option} must be at least 1 (got {value})")
        if self.template not in (None, "chat") and self.template.count("{prompt}") != 1:
            raise UserError(f"--template must be `chat` or contain {{prompt}} once (got {self.template!r})")


def open_subject(path: str | Path, generation: Generation, console: Console) -> Subject:
    """A model of any kind, ready to be asked; its template is the one it was trained with."""
    mesh, source = single_device_mesh(), find_model(path)
    tokenizer = load_tokenizer(source.files)
    data = source.run.data.template if source.run else Data.model_fields["template"].default
    word = source.run.objective.refusal_token if source.run else Objective().refusal_token
    template = Template(generation.template or data, tokenizer)
    model = Decoder(source.config, dtype=jnp.dtype(generation.dtype))
    params = load_with_progress(source, generation.dtype, mesh, console)
    return Subject(model, params, tokenizer, template, mesh, word)


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
