"""What an evaluation asks: the questions of a manifest's files, checked, as cases for a model."""

import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from derta_jax.data.template import Template
from derta_jax.errors import UserError
from derta_jax.evaluation.attacks import Case, Question, ask, completing, completing_prompts, prefill
from derta_jax.evaluation.helpfulness import TASKS, Task, with_prompts
from derta_jax.evaluation.manifest import Attack, Helpfulness, Manifest, PromptFile, read_manifest
from derta_jax.evaluation.questions import PLACEHOLDER, fill, read_questions

ANSWERS: dict[str, str] = {"harmful": "harmful", "benign": "response"}
"""Which answer of a question a curve follows."""


@dataclass(frozen=True)
class Suite:
    """A manifest and where its files are."""

    path: Path
    root: Path
    manifest: Manifest

    def problems(self) -> list[str]:
        """Everything about the files that is not as the manifest says, a line or more each; empty when all is well."""
        return self._sets[1]

    def check(self) -> None:
        """Raise `UserError` with all `problems`, if there are any."""
        if problems := self.problems():
            raise UserError(f"{self.path} cannot be asked:\n" + "\n".join(f"  {problem}" for problem in problems))

    def cases(self, template: Template) -> Iterator[Case]:
        """Every prompt of every set, in the manifest's order. Raises `UserError` as `check` does."""
        self.check()
        sets, _ = self._sets
        for name, attack in self.manifest.attacks.items():
            yield from _attack_cases(name, attack, sets["attacks", name], template)
        for name in self.manifest.over_refusal:
            yield from ask(sets["over_refusal", name], template, "over_refusal", name)
        for name, entry in self.manifest.helpfulness.items():
            group = "helpfulness" if TASKS[entry.task].extractors else "over_refusal"
            yield from ask(sets["helpfulness", name], template, group, name)

    def helpful(self, case: Case, response: str) -> bool:
        """Whether the answer to a case of the group `helpfulness` is right."""
        entry = self.manifest.helpfulness[case.name]
        return TASKS[entry.task].extractor(entry.extractor).correct(case.question, response)

    def curve_questions(self) -> dict[str, list[Question]]:
        """`harmful`: those with a `harmful` answer; `benign`: those with a `response`; empty where not asked for."""
        self.check()
        return {kind: self._sets[0].get(("curves", kind), []) for kind in ANSWERS}

    def provenance(self) -> dict[str, str]:
        """What was asked, for a report: of each set its file, how many questions, and the file's hash."""
        described = {}
        for (group, name), questions in self._sets[0].items():
            entry: Any = getattr(self.manifest, group)
            file = getattr(entry, name) if group == "curves" else entry[name].file
            described[f"{group}.{name}"] = (
                f"{file}, {len(questions)} questions, sha256 {_sha256(self.root / file)[:12]}"
            )
        for name, exam in self.manifest.helpfulness.items():
            if (task := TASKS[exam.task]).extractors:
                rule = task.extractor(exam.extractor)
                described[f"helpfulness.{name}"] += f", {rule.name} {rule.version}, {exam.shots} shots"
        return described

    @functools.cached_property
    def _sets(self) -> tuple[dict[tuple[str, str], list[Question]], list[str]]:
        """The questions of every set that can be read, and all problems; each file is read once."""
        sets: dict[tuple[str, str], list[Question]] = {}
        problems: list[str] = []
        for group, name, entry in self.manifest.entries():
            found, wrong = _read_set(self.root, entry)
            sets[group, name] = found[: entry.limit]
            problems += [f"{group}.{name}: {_with_origin(problem, entry)}" for problem in wrong]
        for kind, answer in ANSWERS.items():
            if file := getattr(self.manifest.curves, kind):
                found, wrong = _attempt(read_questions, self.root / file)
                sets["curves", kind] = [question for question in found if question.get(answer)]
                if found and not sets["curves", kind]:
                    wrong = [f"no question of {self.root / file} has `{answer}`, the answer to follow"]
                problems += [f"curves.{kind}: {problem}" for problem in wrong]
        return sets, problems


def load_suite(path: str | Path, root: str | Path | None = None) -> Suite:
    """Read a suite's manifest; `root` is where its files are, if not where it says. None of them is opened yet.

    Raises `UserError` as `read_manifest` does.
    """
    manifest = read_manifest(path)
    place = Path(root) if root else Path(path).parent / Path(manifest.root).expanduser()
    return Suite(Path(path), place, manifest)


def _read_set(root: Path, entry: PromptFile) -> tuple[list[Question], list[str]]:
    """The questions of a set, and what is wrong with it."""
    path = root / entry.file
    if not path.is_file():
        return [], [f"no file {path}"]
    questions, problems = _attempt(_questions, root, entry)
    if entry.sha256 and (found := _sha256(path)) != entry.sha256:
        problems.append(f"{path} is another file: its sha256 is {found}, expected {entry.sha256}")
    if entry.rows and questions and len(questions) != entry.rows:
        problems.append(f"{path} gives {len(questions)} questions, expected {entry.rows}")
    return questions, problems


def _questions(root: Path, entry: PromptFile) -> list[Question]:
    path = root / entry.file
    if isinstance(entry, Helpfulness):
        return _exam(TASKS[entry.task], root, entry)
    unfit = "safe" if isinstance(entry, Attack) else "unsafe"
    questions = [question for question in read_questions(path) if question.get("label") != unfit]
    if not questions:
        raise UserError(f"{path}: all questions are labelled {unfit}, and none belongs here")
    return _attack_questions(root, entry, questions) if isinstance(entry, Attack) else questions


def _exam(task: Task, root: Path, entry: Helpfulness) -> list[Question]:
    examples = task.read(root / entry.examples) if entry.examples else []
    if len(examples) < entry.shots:
        raise UserError(f"{root / str(entry.examples)} has {len(examples)} examples, fewer than shots={entry.shots}")
    return with_prompts(task, task.read(root / entry.file), examples, entry.shots, entry.prompt)


def _attack_questions(root: Path, entry: Attack, questions: list[Question]) -> list[Question]:
    path = root / entry.file
    if entry.questions:
        try:
            questions = fill(questions, read_questions(root / entry.questions))
        except ValueError as error:
            raise UserError(f"{path}: {error}") from error
    elif open_places := [question["id"] for question in questions if PLACEHOLDER in question["prompt"]]:
        raise UserError(
            f"{path}: {len(open_places)} prompts hold {PLACEHOLDER}, as {open_places[0]!r}: "
            "say with `questions` which file fills it"
        )
    if entry.tokens and not (questions := [question for question in questions if question.get("harmful")]):
        raise UserError(
            f"{path}: no question has a `harmful` answer, which {entry.how} with tokens takes its words from"
        )
    return questions


def _attack_cases(name: str, attack: Attack, questions: Sequence[Question], template: Template) -> Iterator[Case]:
    match attack.how:
        case "plain":
            yield from ask(questions, template, "attacks", name)
        case "prefill":
            for tokens in attack.tokens:
                yield from prefill(questions, template, tokens, name)
        case "completing" if attack.tokens:
            yield from completing(questions, template.tokenizer, attack.tokens[0], name)
        case "completing":
            yield from completing_prompts(questions, template.tokenizer, name)


def _attempt(read: Callable[..., list[Question]], *arguments: Any) -> tuple[list[Question], list[str]]:
    try:
        return read(*arguments), []
    except UserError as error:
        return [], [str(error).replace("\n", "\n  ")]


def _with_origin(problem: str, entry: PromptFile) -> str:
    """The problem, and in brackets where the right file is from, as far as the manifest says."""
    parts = [f"from {entry.source}" if entry.source else "", f"licence: {entry.licence}" if entry.licence else ""]
    known = "; ".join(filter(None, parts))
    line, newline, more = problem.partition("\n")
    return f"{line} ({known}){newline}{more}" if known else problem


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
