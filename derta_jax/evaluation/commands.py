"""`derta generate` and `derta evaluate`: files in, models asked, files out."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from derta_jax import __version__
from derta_jax.errors import UserError
from derta_jax.evaluation.answering import answer_all, settings_of
from derta_jax.evaluation.attacks import Case, Question, ask, completing, prefill
from derta_jax.evaluation.compare import compare
from derta_jax.evaluation.evaluate import Helpful
from derta_jax.evaluation.files import make_directory, write_rows, write_whole
from derta_jax.evaluation.judging.local_model import speaker
from derta_jax.evaluation.judging.opening import open_judge
from derta_jax.evaluation.judging.rules import DEFAULT_JUDGE
from derta_jax.evaluation.questions import read_questions
from derta_jax.evaluation.report import render_report, results_markdown, results_table, write_results
from derta_jax.evaluation.row_log import RowLog
from derta_jax.evaluation.subject import Generation, Subject, open_subject
from derta_jax.evaluation.suite import load_suite

COMPLETING_TOKENS = 8
RULE_SUMMARY = "A rule judged these answers: it ranks models, it does not replace labels by people."


def generate_file(model: str, prompts: str, output: str, generation: Generation, raw: bool, console: Console) -> None:
    """Answer each line of `prompts` into `output`: the input row plus prompt, response, ids and finish reason.

    Answers are kept beside it as they are made, and the same command goes on with them after a stop.
    """
    questions = read_questions(prompts)
    place = Path(output)
    make_directory(place.parent)
    if place.is_dir():
        raise UserError(f"--output {output} is a directory: name a file in it")
    subject = open_subject(model, generation, console)
    texts = [question["prompt"] if raw else subject.template.render(question["prompt"]) for question in questions]
    prompt_ids = [subject.tokenizer.prompt_ids(text) for text in texts]
    log = RowLog(place.with_name(f"{place.name}.partial"), settings_of(subject, generation, prompt_ids))
    with log:
        answers = answer_all(subject, prompt_ids, generation, log, console, "generate")
    rows = [
        {
            **question,
            "response": subject.tokenizer.decode(answer.token_ids),
            "response_token_ids": answer.token_ids,
            "finish_reason": answer.finish_reason,
        }
        for question, answer in zip(questions, answers, strict=True)
    ]
    write_rows(rows, place)
    log.path.unlink()
    console.print(f"{len(rows):,} answers: {output}", highlight=False, soft_wrap=True)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What models are asked: `cases` of a model, the `known` answers to follow p(refusal) along, who marks help."""

    cases: Callable[[Subject], Iterable[Case]]
    known: Mapping[str, Sequence[Question]]
    helpful: Helpful
    provenance: Mapping[str, Any]


def plan_of_suite(path: str) -> Plan:
    """What the suite's YAML file says. Raises `UserError` with all that its files lack."""
    suite = load_suite(path)
    suite.check()
    provenance = {"suite": path, **suite.provenance()}
    return Plan(lambda subject: suite.cases(subject.template), suite.curve_questions(), suite.helpful, provenance)


def plan_of_files(harmful: str, benign: str | None, prefills: Sequence[int]) -> Plan:
    """Harmful questions asked plainly, after prefills and as raw text; benign ones for over-refusal."""
    if wrong := [tokens for tokens in prefills if tokens < 1]:
        raise UserError(f"--prefill must be at least 1 (got {wrong[0]})")
    attacked, harmless = read_questions(harmful), read_questions(benign) if benign else []

    def cases(subject: Subject) -> Iterator[Case]:
        yield from ask(attacked, subject.template, "attacks", "plain")
        for tokens in prefills:
            yield from prefill(attacked, subject.template, tokens)
        yield from completing(attacked, subject.tokenizer, COMPLETING_TOKENS)
        yield from ask(harmless, subject.template, "over_refusal", "benign")

    known = {"harmful": attacked, "benign": harmless}
    return Plan(cases, known, lambda case, response: False, {"harmful": harmful, "benign": benign or "none"})


def evaluate_models(
    models: Sequence[str], plan: Plan, judge: str, output: str, generation: Generation, console: Console
) -> None:
    """Ask each `NAME=PATH` everything; write `results.json`, `results.md`, `report.html` and all answers to `output`.

    `judge` is the name of a rule or a YAML file.
    """
    named = dict(_name_and_path(model) for model in models)
    if len(named) < len(models):
        raise UserError("two models have the same name: give them NAME=PATH")
    if wrong_names := [name for name in named if "/" in name or name.startswith(".")]:
        raise UserError(f"{wrong_names[0]!r} cannot be the name of a model: its answers go to a file of that name")
    if missing := [path for path in named.values() if not Path(path).is_dir()]:
        raise UserError(f"no model directory {', '.join(missing)}")
    opened = open_judge(judge, speaker(judge, generation, console))
    directory = Path(output)
    make_directory(directory)
    results, details = compare(named, plan.cases, opened, generation, plan.known, directory, console, plan.helpful)
    details["title"] = "Safety evaluation"
    if judge == DEFAULT_JUDGE.name:
        details["summary"] = RULE_SUMMARY
    details["provenance"] = {"derta_jax": __version__, **plan.provenance, **details["provenance"]}
    write_results(results, directory / "results.json")
    write_whole(results_markdown(results), directory / "results.md")
    render_report(results, details, directory / "report.html")
    console.print(results_table(results))
    console.print(f"report: {directory / 'report.html'}")


def _name_and_path(model: str) -> tuple[str, str]:
    name, equals, path = model.partition("=")
    return (name, path) if equals and not Path(model).exists() else (Path(model).resolve().name, model)
