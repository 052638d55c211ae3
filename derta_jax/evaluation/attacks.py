"""Questions → what a model is given: asked plainly, with its answer begun for it, or as raw text to complete."""

import dataclasses
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from derta_jax.data.recipes import Row
from derta_jax.data.template import Template
from derta_jax.data.tokenise import Region, tokenise
from derta_jax.interop.tokenizer import Tokenizer

Question = Mapping[str, Any]
"""`id`, `prompt`, and for some uses `harmful`, a harmful answer, or `response`, a good one."""

How = Literal["plain", "prefill", "completing"]
"""Asked in the chat template; with its answer begun; as raw text to go on with."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One prompt to answer. The model reads `prompt_ids`; the last of them may be put in its mouth: `prefill`, in text.

    `group` is where its figure goes: `attacks`, `helpfulness` or `over_refusal`; `name` is the attack, task or set.
    `how` it is asked is what a judge may need to know beside the name.
    """

    group: str
    name: str
    question: Question
    prompt_ids: list[int]
    prefill: str = ""
    prefill_ids: Sequence[int] = ()
    how: How = "plain"


def ask(questions: Sequence[Question], template: Template, group: str, name: str) -> Iterator[Case]:
    """Each question in the chat template."""
    for question in questions:
        yield Case(group, name, question, template.tokenizer.prompt_ids(template.render(question["prompt"])))


def prefill(questions: Sequence[Question], template: Template, tokens: int, name: str = "prefill") -> Iterator[Case]:
    """The question, and the first `tokens` tokens of its harmful answer; questions without one are left out.

    The attack is called `name-tokens`.
    """
    for question in questions:
        if question.get("harmful"):
            prompt_ids, answer_ids = split_answer(question["prompt"], question["harmful"], template)
            given = answer_ids[:tokens]
            text = template.tokenizer.decode(given)
            yield Case("attacks", f"{name}-{tokens}", question, prompt_ids + given, text, given, "prefill")


def completing(
    questions: Sequence[Question], tokenizer: Tokenizer, tokens: int, name: str = "completing"
) -> Iterator[Case]:
    """No template: raw text that opens like the harmful answer, for the model to go on with."""
    for question in questions:
        if question.get("harmful"):
            yield _raw(question, tokenizer, tokenizer.encode(question["harmful"])[:tokens], name)


def completing_prompts(questions: Sequence[Question], tokenizer: Tokenizer, name: str = "completing") -> Iterator[Case]:
    """No template: the prompt itself is the raw text to go on with."""
    for question in questions:
        yield _raw(question, tokenizer, tokenizer.encode(question["prompt"]), name)


def _raw(question: Question, tokenizer: Tokenizer, opening: list[int], name: str) -> Case:
    prompt_ids = tokenizer.leading_ids("") + opening
    return Case("attacks", name, question, prompt_ids, tokenizer.decode(opening), opening, "completing")


def split_answer(prompt: str, answer: str, template: Template) -> tuple[list[int], list[int]]:
    """Token ids of the templated prompt and of its answer, as a training row has them."""
    row = Row(id="", recipe="", prompt=prompt, response=answer)
    (tokens,) = tokenise([row], template.tokenizer, template, sequence_length=sys.maxsize)
    prompt_ids, answer_ids = (tokens.token_ids[tokens.regions == part] for part in (Region.PROMPT, Region.RESPONSE))
    return prompt_ids.tolist(), answer_ids.tolist()
