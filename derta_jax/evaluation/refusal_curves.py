"""p(refusal | question, answer so far) of one model: along known answers, and along its own."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from derta_jax.evaluation.attacks import Case, Question, split_answer
from derta_jax.evaluation.generate import Answer
from derta_jax.evaluation.positions import curve, refusal_probabilities
from derta_jax.evaluation.subject import Subject


def refusal_curve(
    subject: Subject, questions: Sequence[Question], answer_key: str, batch_size: int
) -> dict[str, list[float]]:
    """p(refusal | q, r̂_<t) along known answers (`harmful` or `response`), as far as the context reaches."""
    pairs = [
        split_answer(question["prompt"], question[answer_key], subject.template)
        for question in questions
        if question.get(answer_key)
    ]
    context = subject.model.config.max_positions
    fitting = [(prompt, answer) for prompt, answer in pairs if len(prompt) + len(answer) <= context]
    return curve(_probabilities(subject, fitting, batch_size))


def along_own_answer(subject: Subject, case: Case, answer: Answer) -> dict[str, Any]:
    """An answer's tokens, each with the probability that the model would have refused in its place."""
    token_ids = answer.token_ids
    probabilities = _probabilities(subject, [(case.prompt_ids, token_ids)], 1)[0] if token_ids else np.zeros(0)
    return {
        "tokens": subject.tokenizer.token_texts(token_ids),
        "p_refusal": [float(value) for value in probabilities],
    }


def _probabilities(subject: Subject, pairs: Sequence[tuple[list[int], list[int]]], batch_size: int) -> list[np.ndarray]:
    prompts, answers = [prompt for prompt, _ in pairs], [answer for _, answer in pairs]
    with jax.set_mesh(subject.mesh):
        return refusal_probabilities(subject.model, subject.params, prompts, answers, subject.refusal_id, batch_size)
