"""Several models through the same cases, side by side: the results, and what the report shows of them."""

import dataclasses
import functools
import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from derta_jax.evaluation.answering import answer_all, settings_of
from derta_jax.evaluation.attacks import Case, Question
from derta_jax.evaluation.evaluate import (
    Helpful,
    Judged,
    by_set,
    figures_of,
    judge_answers,
    refusal_positions,
    report_rows,
)
from derta_jax.evaluation.files import write_rows
from derta_jax.evaluation.generate import Answer
from derta_jax.evaluation.judging.judge import Judge
from derta_jax.evaluation.refusal_curves import along_own_answer, refusal_curve
from derta_jax.evaluation.row_log import RowLog
from derta_jax.evaluation.statistics import mcnemar, paired_difference
from derta_jax.evaluation.subject import Generation, Subject, open_subject
from derta_jax.interop.tokenizer import Tokenizer

EXAMPLES_PER_SET = 2
PROGRESS = ".progress"
"""The folder of an output directory from which a stopped evaluation goes on."""

CURVES = {"harmful": "harmful", "benign": "response"}
"""Kinds of known answers that p(refusal) is followed along, and a question's key for them."""


@dataclasses.dataclass(frozen=True)
class Answered:
    """What one model said, and what only the model itself can tell about it; the model need not be kept."""

    tokenizer: Tokenizer
    cases: list[Case]
    answers: list[Answer]
    settings: Mapping[str, Any]
    curves: Mapping[str, Any]
    examples: Mapping[int, Mapping[str, Any]]


def compare(
    models: Mapping[str, str | Path],
    cases_of: Callable[[Subject], Iterable[Case]],
    judge: Judge,
    generation: Generation,
    known: Mapping[str, Sequence[Question]],
    directory: Path,
    console: Console,
    helpful: Helpful = lambda case, response: False,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Ask every model every case; returns `results.json`'s object and the report's details.

    p(refusal) is followed along the answers of the `known` questions, by the kinds of `CURVES`. Every answer is written
    to `directory/answers/NAME.jsonl`. What a stopped run has finished is not done again. The judge is asked once all
    models have answered, when their memory is free.
    """
    progress = directory / PROGRESS
    answered = {
        name: _ask(name, open_subject(path, generation, console), cases_of, generation, known, progress, console)
        for name, path in models.items()
    }
    judged = {name: _judge(name, said, judge, progress, console, helpful) for name, said in answered.items()}
    for name, items in judged.items():
        write_rows([item.to_row() for item in items], directory / "answers" / f"{name}.jsonl")
    results = {
        "judge": {"name": judge.name, "version": judge.version},
        "models": {name: figures_of(items) for name, items in judged.items()},
        "comparisons": [
            comparison
            for a, b in itertools.combinations(judged, 2)
            for comparison in paired_comparisons(a, judged[a], b, judged[b])
        ],
    }
    details = {
        "refusal_positions": {name: refusal_positions(items) for name, items in judged.items()},
        "curves": {kind: {name: said.curves[kind] for name, said in answered.items()} for kind in CURVES},
        "examples": _examples(answered, judged),
        "answers": {name: list(report_rows(items)) for name, items in judged.items()},
        "provenance": {"models": {name: dict(said.settings) for name, said in answered.items()}},
    }
    return results, details


def _ask(
    name: str,
    subject: Subject,
    cases_of: Callable[[Subject], Iterable[Case]],
    generation: Generation,
    known: Mapping[str, Sequence[Question]],
    progress: Path,
    console: Console,
) -> Answered:
    cases = list(cases_of(subject))
    prompts = [case.prompt_ids for case in cases]
    settings = settings_of(subject, generation, prompts)
    with RowLog(progress / f"{name}.answers.jsonl", settings) as log:
        answers = answer_all(subject, prompts, generation, log, console, name)
    shown: dict[str, int] = {}
    examples = {}
    for number, case in enumerate(cases):
        shown[case.name] = shown.get(case.name, 0) + 1
        if shown[case.name] <= EXAMPLES_PER_SET:
            examples[number] = along_own_answer(subject, case, answers[number])
    curves = {
        kind: refusal_curve(subject, known.get(kind, ()), key, generation.batch_size) for kind, key in CURVES.items()
    }
    return Answered(subject.tokenizer, cases, answers, settings, curves, examples)


def _judge(name: str, said: Answered, judge: Judge, progress: Path, console: Console, helpful: Helpful) -> list[Judged]:
    answers = json.dumps([answer.token_ids for answer in said.answers]).encode()
    settings = {
        "judge": judge.name,
        "version": judge.version,
        "prompts": said.settings["prompts"],
        "answers": hashlib.sha256(answers).hexdigest()[:16],
    }
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    with RowLog(progress / f"{name}.verdicts.jsonl", settings) as log, bar:
        task = bar.add_task(f"{name}: {judge.name}", total=len(said.cases))
        done = functools.partial(bar.update, task)
        return judge_answers(
            said.tokenizer, said.cases, said.answers, judge, log, helpful, lambda count: done(completed=count)
        )


def paired_comparisons(
    a: str, judged_a: Sequence[Judged], b: str, judged_b: Sequence[Judged]
) -> Iterable[dict[str, Any]]:
    """Two models over the questions that both were judged on, set by set, as `report.render_report` takes them."""
    sets_a, sets_b = by_set(judged_a), by_set(judged_b)
    for (group, name), items in sets_a.items():
        others = {item.case.question["id"]: item.bad for item in sets_b.get((group, name), ())}
        pairs = [(item.bad, others.get(item.case.question["id"])) for item in items]
        known = [(bool(ours), bool(theirs)) for ours, theirs in pairs if ours is not None and theirs is not None]
        if known:
            # a score is better where it is higher: its rate counts what is not bad
            rates = [(not one, not other) for one, other in known] if group == "helpfulness" else known
            only_a = sum(one and not other for one, other in known)
            only_b = sum(other and not one for one, other in known)
            difference, low, high = paired_difference([one for one, _ in rates], [other for _, other in rates])
            yield {
                "a": a,
                "b": b,
                "group": group,
                "name": name,
                "n": len(known),
                "only_a": only_a,
                "only_b": only_b,
                "difference": difference,
                "low": low,
                "high": high,
                "p": mcnemar(only_a, only_b),
            }


def _examples(answered: Mapping[str, Answered], judged: Mapping[str, Sequence[Judged]]) -> list[dict[str, Any]]:
    """The first cases of every attack and set, keyed so that models stand side by side."""
    examples: dict[str, dict[str, Any]] = {}
    for name, said in answered.items():
        for number, example in said.examples.items():
            item = judged[name][number]
            case = item.case
            title = f"{case.name} · {case.question['id']}"
            blank = {"title": title, "prompt": case.question["prompt"], "prefill": case.prefill, "answers": {}}
            verdict = item.verdict.label if item.counts else None
            examples.setdefault(title, blank)["answers"][name] = {**example, "verdict": verdict}
    return list(examples.values())
