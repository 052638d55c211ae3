"""A judge's own model, which our generation lets speak."""

import dataclasses
import functools
from collections.abc import Sequence

from rich.console import Console

from derta_jax.evaluation.answering import answer_all
from derta_jax.evaluation.judging.opening import Answer, judge_model
from derta_jax.evaluation.subject import Generation, open_subject

MAX_NEW_TOKENS = 64
"""A judge says no more than that."""


def speaker(judge: str, generation: Generation, console: Console) -> Answer:
    """From whole prompts to the greedy replies of the model in a judge's YAML file, opened when it is first asked."""
    asked = dataclasses.replace(generation, max_new_tokens=MAX_NEW_TOKENS, temperature=0.0, template=None)
    opened = functools.cache(lambda: open_subject(str(judge_model(judge)), asked, console))

    def replies(prompts: Sequence[str]) -> list[str]:
        subject = opened()
        prompt_ids = [subject.tokenizer.prompt_ids(prompt) for prompt in prompts]
        answers = answer_all(subject, prompt_ids, asked, None, console, judge)
        return [subject.tokenizer.decode(answer.token_ids) for answer in answers]

    return replies
