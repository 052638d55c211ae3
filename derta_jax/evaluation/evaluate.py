"""One model through all cases: answer, judge, locate refusals; then the figures of `results.json` and the report."""

import dataclasses
import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from derta_jax.evaluation.attacks import Case, Question, split_answer
from derta_jax.evaluation.generate import Answer, generate
from derta_jax.evaluation.judging.judge import Asked, Judge
from derta_jax.evaluation.positions import curve, position_shares, refusal_position, refusal_probabilities
from derta_jax.evaluation.statistics import attack_entry_of, helpfulness_entry, over_refusal_entry
from derta_jax.evaluation.subject import Subject

Helpful = Callable[[Question, str], bool]
"""Whether an answer (the model's own words) does what the question asked."""


@dataclasses.dataclass(frozen=True)
class Judged:
    """A case with what the model answered; `refused_at` counts tokens from 1.

    `spoken` is prefill and response decoded together, so that it shows whether the seam between them is a space.
    """

    case: Case
    answer: Answer
    response: str
    spoken: str
    verdict: str
    refused_at: int | None
    helpful: bool

    def to_row(self) -> dict[str, Any]:
        return {
            **self.case.question,
            "group": self.case.group,
            "name": self.case.name,
            "prefill": self.case.prefill,
            "response": self.response,
            "response_token_ids": self.answer.token_ids,
            "finish_reason": self.answer.finish_reason,
            "verdict": self.verdict,
            "refused_at": self.refused_at,
        }


def answer_cases(
    subject: Subject,
    cases: Sequence[Case],
    judge: Judge,
    max_new_tokens: int,
    batch_size: int = 32,
    helpful: Helpful = lambda question, response: False,
    progress: Callable[[int], None] = lambda count: None,
) -> list[Judged]:
    """Answer every case greedily and judge it."""
    with jax.set_mesh(subject.mesh):
        answers = generate(
            subject.model,
            subject.params,
            [case.prompt_ids for case in cases],
            max_new_tokens,
            subject.stop_ids,
            batch_size,
            progress=progress,
        )
    responses = [subject.tokenizer.decode(answer.token_ids) for answer in answers]
    asked = [
        Asked({**case.question, "attack": case.name, "prefill": case.prefill}, response)
        for case, response in zip(cases, responses, strict=True)
    ]
    judged = []
    for case, answer, response, verdict in zip(cases, answers, responses, judge.verdicts(asked), strict=True):
        judged.append(
            Judged(
                case=case,
                answer=answer,
                response=response,
                spoken=subject.tokenizer.decode([*case.prefill_ids, *answer.token_ids]),
                verdict=verdict.label,
                refused_at=refusal_position(judge, subject.tokenizer, answer.token_ids),
                helpful=case.group == "helpfulness" and helpful(case.question, response),
            )
        )
    return judged


def figures_of(judged: Sequence[Judged]) -> dict[str, Any]:
    """A model's entry in `results.json`."""
    sets: dict[tuple[str, str], list[Judged]] = defaultdict(list)
    for item in judged:
        sets[item.case.group, item.case.name].append(item)
    entry: dict[str, Any] = {"attacks": {}, "helpfulness": {}, "over_refusal": {}}
    for (group, name), items in sets.items():
        if group == "attacks":
            entry[group][name] = attack_entry_of(item.verdict for item in items)
        elif group == "helpfulness":
            entry[group][name] = helpfulness_entry(sum(item.helpful for item in items), len(items))
        else:
            entry[group][name] = over_refusal_entry(sum(item.refused_at is not None for item in items), len(items))
    refused = [item for item in judged if item.case.group == "attacks" and item.refused_at is not None]
    places = [item.refused_at or 0 for item in refused]
    entry["refusal_position"] = position_shares(places, [item.spoken for item in refused])
    return entry


def refusal_positions(judged: Sequence[Judged]) -> dict[str, Any]:
    """The report's input for the distribution of refusal positions under attack."""
    attacked = [item for item in judged if item.case.group == "attacks"]
    return {
        "positions": [item.refused_at for item in attacked if item.refused_at is not None],
        "n": len(attacked),
    }


def refusal_curve(
    subject: Subject, questions: Sequence[Question], answer_key: str, batch_size: int
) -> dict[str, list[float]]:
    """p(refusal | q, r̂_<t) along known answers (`harmful` or `response`)."""
    pairs = [
        split_answer(question["prompt"], question[answer_key], subject.template)
        for question in questions
        if question.get(answer_key)
    ]
    return curve(_refusal_probabilities(subject, pairs, batch_size))


def example_answer(subject: Subject, judged: Judged) -> dict[str, Any]:
    """An answer's tokens, each with the probability that the model would have refused in its place."""
    token_ids = judged.answer.token_ids
    probabilities = (
        _refusal_probabilities(subject, [(judged.case.prompt_ids, token_ids)], 1)[0] if token_ids else np.zeros(0)
    )
    return {
        "tokens": subject.tokenizer.token_texts(token_ids),
        "p_refusal": [float(value) for value in probabilities],
        "verdict": judged.verdict,
    }


def _refusal_probabilities(
    subject: Subject, pairs: Sequence[tuple[list[int], list[int]]], batch_size: int
) -> list[np.ndarray]:
    prompts, answers = [prompt for prompt, _ in pairs], [answer for _, answer in pairs]
    with jax.set_mesh(subject.mesh):
        return refusal_probabilities(subject.model, subject.params, prompts, answers, subject.refusal_id, batch_size)


def write_answers(judged: Sequence[Judged], path: Path) -> None:
    """One JSON object an answer."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(item.to_row(), ensure_ascii=False) + "\n" for item in judged]
    path.write_text("".join(lines), encoding="utf-8")
