"""`derta generate` and `derta evaluate`: files in, models asked, files out."""

import functools
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from derta_jax.errors import UserError
from derta_jax.evaluation.attacks import Case, Question, ask, completing, prefill
from derta_jax.evaluation.compare import advance, compare, progress_bar
from derta_jax.evaluation.generate import generate
from derta_jax.evaluation.judging.judge import Judge
from derta_jax.evaluation.judging.rules import DEFAULT_JUDGE
from derta_jax.evaluation.report import render_report, results_table, write_results
from derta_jax.evaluation.subject import Generation, Subject, open_subject

PROMPT_KEYS = ("prompt", "question")
COMPLETING_TOKENS = 8


def read_questions(path: str | Path) -> list[dict[str, Any]]:
    """JSONL objects with `prompt` or `question`; an `id` is made from the line where there is none.

    Raises `UserError` naming file, line and field.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no prompts file {path}")
    questions, problems = [], []
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8"))
            prompt = next(row[key] for key in PROMPT_KEYS if key in row)
            if not isinstance(prompt, str) or not prompt.strip():
                raise ValueError("the prompt must be a string that is not empty")
            questions.append({"id": f"{path.stem}-{number}"} | row | {"prompt": prompt})
        except (StopIteration, TypeError):
            problems.append(f"{path}:{number}: has neither `prompt` nor `question`")
        except ValueError as error:
            problems.append(f"{path}:{number}: {error}")
    if problems:
        raise UserError("the prompts have problems:\n" + "\n".join(f"  {problem}" for problem in problems[:20]))
    if not questions:
        raise UserError(f"no prompts in {path}")
    return questions


def generate_file(
    model: str,
    prompts: str,
    output: str,
    generation: Generation,
    raw: bool,
    console: Console,
) -> None:
    """Answer each line of `prompts` into `output`: the input row plus prompt, response, ids and finish reason."""
    questions = read_questions(prompts)
    _make_directory(Path(output).parent)
    if Path(output).is_dir():
        raise UserError(f"--output {output} is a directory: name a file in it")
    subject = open_subject(model, generation, console)
    texts = [question["prompt"] if raw else subject.template.render(question["prompt"]) for question in questions]
    prompt_ids = [subject.tokenizer.prompt_ids(text) for text in texts]
    with progress_bar(console) as bar, jax.set_mesh(subject.mesh):
        task = bar.add_task("generate", total=len(questions))
        started = time.monotonic()
        answers = generate(
            subject.model,
            subject.params,
            prompt_ids,
            generation.max_new_tokens,
            subject.stop_ids,
            generation.batch_size,
            generation.temperature,
            generation.seed,
            progress=functools.partial(advance, bar, task),
        )
    seconds = time.monotonic() - started
    rows = [
        question
        | {
            "response": subject.tokenizer.decode(answer.token_ids),
            "response_token_ids": answer.token_ids,
            "finish_reason": answer.finish_reason,
        }
        for question, answer in zip(questions, answers, strict=True)
    ]
    Path(output).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    count = sum(len(answer.token_ids) for answer in answers)
    console.print(f"{len(rows):,} answers, {count / seconds:,.0f} tokens/s: {output}")


def evaluate_models(
    models: Sequence[str],
    harmful: str,
    benign: str | None,
    prefills: Sequence[int],
    output: str,
    generation: Generation,
    console: Console,
    judge: Judge = DEFAULT_JUDGE,
) -> None:
    """Attack each `NAME=PATH` and write `results.json`, `report.html` and every answer to `output`."""
    named = dict(_name_and_path(model) for model in models)
    if len(named) < len(models):
        raise UserError("two models have the same name: give them NAME=PATH")
    if wrong_names := [name for name in named if "/" in name or name.startswith(".")]:
        raise UserError(f"{wrong_names[0]!r} cannot be the name of a model: its answers go to a file of that name")
    if missing := [path for path in named.values() if not Path(path).is_dir()]:
        raise UserError(f"no model directory {', '.join(missing)}")
    if wrong := [tokens for tokens in prefills if tokens < 1]:
        raise UserError(f"--prefill must be at least 1 (got {wrong[0]})")
    attack_rows = read_questions(harmful)
    benign_rows = read_questions(benign) if benign else []
    directory = Path(output)
    _make_directory(directory)
    results, details = compare(
        named,
        lambda subject: _cases(attack_rows, benign_rows, prefills, subject),
        judge,
        generation,
        attack_rows,
        benign_rows,
        directory,
        console,
    )
    details["title"] = "Safety evaluation"
    details["summary"] = "A rule judged these answers: it ranks models, it does not replace labels by people."
    details["provenance"] = {"harmful": harmful, "benign": benign or "none", **named}
    write_results(results, directory / "results.json")
    render_report(results, details, directory / "report.html")
    console.print(results_table(results))
    console.print(f"report: {directory / 'report.html'}")


def _cases(
    harmful: Sequence[Question], benign: Sequence[Question], prefills: Sequence[int], subject: Subject
) -> Iterator[Case]:
    yield from ask(harmful, subject.template, "attacks", "plain")
    for tokens in prefills:
        yield from prefill(harmful, subject.template, tokens)
    yield from completing(harmful, subject.tokenizer, COMPLETING_TOKENS)
    yield from ask(benign, subject.template, "over_refusal", "benign")


def _name_and_path(model: str) -> tuple[str, str]:
    name, equals, path = model.partition("=")
    return (name, path) if equals and not Path(model).exists() else (Path(model).resolve().name, model)


def _make_directory(path: Path) -> None:
    """Before the work, not after it, when nothing can be written."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {path}: {error.strerror}") from error
