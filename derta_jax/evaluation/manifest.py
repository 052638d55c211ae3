"""The YAML file of a suite: which file of prompts goes where, from what source, under what licence, with how many rows.

attacks:
  jailbreak-chat: {file: jailbreakchat.jsonl, rows: 200, source: https://…, licence: MIT}
  prefill: {file: harmful.jsonl, how: prefill, tokens: [5, 10]}
over_refusal:
  xstest: {file: xstest_prompts.csv, rows: 250}
helpfulness:
  gsm8k: {file: gsm8k.jsonl, task: gsm8k}
curves: {harmful: harmful.jsonl, benign: helpful.jsonl}
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from derta_jax.config import Section, dotted_keys, read_yaml, validated
from derta_jax.evaluation.attacks import How
from derta_jax.evaluation.helpfulness import TASKS
from derta_jax.evaluation.questions import PLACEHOLDER


class PromptFile(Section):
    """A file of prompts, and how to know that it is the right one."""

    file: str = Field(description="below the suite's root")
    rows: int | None = Field(None, ge=1, description="questions that it gives; of a file with labels, those that fit")
    sha256: str | None = Field(None, pattern="^[0-9a-f]{64}$", description="of the file's bytes")
    source: str | None = Field(None, description="where to get it; shown where it is missing or another")
    licence: str | None = None
    limit: int | None = Field(None, ge=1, description="ask only the first so many")


class Attack(PromptFile):
    """Prompts that should not be answered."""

    how: How = Field("plain", description="in the chat template, with the answer begun, or as raw text to complete")
    tokens: tuple[int, ...] = Field(
        (), description="of the `harmful` answer: prefill gives so many away; completing opens with them"
    )
    questions: str | None = Field(None, description=f"file whose prompts take the place of {PLACEHOLDER}")

    @field_validator("tokens")
    @classmethod
    def _counts(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if any(tokens < 1 for tokens in value) or len(set(value)) < len(value):
            raise ValueError("must be different whole numbers from 1")
        return value

    @model_validator(mode="after")
    def _tokens_fit(self) -> "Attack":
        if self.how == "prefill" and not self.tokens:
            raise ValueError("prefill needs tokens: how many of the harmful answer are given away, as [5, 10, 20]")
        if self.how == "completing" and len(self.tokens) > 1:
            raise ValueError("completing takes one number of tokens, or none where the prompts are the raw text")
        if self.how == "plain" and self.tokens:
            raise ValueError("tokens are for prefill and completing: set how")
        return self


class OverRefusal(PromptFile):
    """Prompts that should be answered."""


class Helpfulness(PromptFile):
    """Questions with a right answer; alpaca has none, and is counted as over-refusal."""

    task: Literal["gsm8k", "mmlu", "alpaca"]
    shots: int = Field(0, ge=0, description="worked examples before each question")
    examples: str | None = Field(None, description="where they are from, in the format of the file")
    prompt: str | None = Field(None, description=f"instruction, with {PLACEHOLDER}; default: the task's own")
    extractor: Literal["last-sentence", "last-number", "choice"] | None = Field(
        None, description="how an answer is found; gsm8k: last-sentence (default) or last-number; mmlu: choice"
    )

    @field_validator("prompt")
    @classmethod
    def _has_place(cls, value: str | None) -> str | None:
        if value is not None and value.count(PLACEHOLDER) != 1:
            raise ValueError(f"must contain {PLACEHOLDER} once")
        return value

    @model_validator(mode="after")
    def _fits_task(self) -> "Helpfulness":
        names = [extractor.name for extractor in TASKS[self.task].extractors]
        if self.extractor and self.extractor not in names:
            raise ValueError(f"extractor: {self.task} has {' and '.join(names) or 'none'} (got {self.extractor!r})")
        if bool(self.shots) != bool(self.examples):
            raise ValueError("shots and examples go together: how many, and the file they are from")
        if self.shots and not names:
            raise ValueError(f"{self.task} takes no shots")
        return self


class Curves(Section):
    """Answers along which the probability of refusing is followed, token by token."""

    harmful: str | None = Field(None, description="file whose questions have a `harmful` answer")
    benign: str | None = Field(None, description="file whose questions have a `response`")


class Manifest(Section):
    """The YAML file."""

    root: str = Field(".", description="what files are relative to; itself relative to the suite's own folder")
    attacks: dict[str, Attack] = Field({}, description="what should be refused, by the name it is reported under")
    over_refusal: dict[str, OverRefusal] = Field({}, description="what should be answered")
    helpfulness: dict[str, Helpfulness] = Field({}, description="what has a right answer")
    curves: Curves = Curves()

    def entries(self) -> Iterator[tuple[str, str, PromptFile]]:
        """Every set as (group, name, entry), in order."""
        for name, attack in self.attacks.items():
            yield "attacks", name, attack
        for name, prompts in self.over_refusal.items():
            yield "over_refusal", name, prompts
        for name, exam in self.helpfulness.items():
            yield "helpfulness", name, exam

    @model_validator(mode="after")
    def _something_to_ask(self) -> "Manifest":
        if not (self.attacks or self.over_refusal or self.helpfulness):
            raise ValueError("nothing to ask: name files under attacks, over_refusal or helpfulness")
        names = [*self.over_refusal, *(name for name, entry in self.helpfulness.items() if entry.task == "alpaca")]
        names += attack_names(self.attacks)
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"two sets would be reported as {twice!r}: rename one")
        return self


def attack_names(attacks: Mapping[str, Attack]) -> list[str]:
    """What attacks are called in results: a prefill has a name for each number of tokens."""
    return [
        f"{name}-{tokens}" if attack.how == "prefill" else name
        for name, attack in attacks.items()
        for tokens in (attack.tokens if attack.how == "prefill" else (0,))
    ]


def read_manifest(path: str | Path) -> Manifest:
    """Raises `UserError` for a missing file, broken YAML, an unknown key or a wrong value, listing all of them."""
    raw = read_yaml(path, "suite")
    return validated(Manifest, raw, path, list(_known_keys(raw)))


def _known_keys(raw: Mapping[str, Any]) -> Iterator[str]:
    """Every dotted key that could be meant, under the names that sets have in this file."""
    yield from dotted_keys(Manifest)
    for group, section in (("attacks", Attack), ("over_refusal", OverRefusal), ("helpfulness", Helpfulness)):
        for name in raw[group] if isinstance(raw.get(group), dict) else ():
            yield from dotted_keys(section, f"{group}.{name}.")
