"""Conversations of several turns as the text that a model reads."""

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError

from derta_jax.data.template import Template
from derta_jax.errors import UserError

Turn = Mapping[str, Any]
"""`role` is `system`, `user` or `assistant`; `content` is a text."""


def conversation_text(turns: Sequence[Turn], template: Template) -> str:
    """The text up to where the model speaks: it answers a user's last turn, or goes on with an assistant's.

    Raises `UserError` where the template has no place for these turns.
    """
    if not turns or turns[-1]["role"] not in ("user", "assistant"):
        raise UserError("a conversation must end with a user's turn, or with the beginning of an assistant's")
    goes_on = turns[-1]["role"] == "assistant"
    if template.pattern != "chat":
        return _in_pattern(turns, template)
    tokenizer = template.tokenizer
    try:
        return tokenizer.hf.apply_chat_template(
            list(turns), tokenize=False, add_generation_prompt=not goes_on, continue_final_message=goes_on
        )
    except (TemplateError, ValueError) as error:
        roles = ", ".join(turn["role"] for turn in turns)
        raise UserError(
            f"the chat template of the tokenizer in {tokenizer.directory} has no place for these turns ({roles}): "
            f"{error}"
        ) from error


def _in_pattern(turns: Sequence[Turn], template: Template) -> str:
    """Questions and answers as training rows, one after the other; a system's turn opens the question that follows."""
    text, question, opening = "", None, ""
    for turn in turns:
        role, content = turn["role"], turn["content"]
        if role == "system":
            opening += f"{content}\n\n"
        elif role == "user" and question is None:
            question, opening = opening + content, ""
        elif role == "assistant" and question is not None:
            text += template.render(question) + template.gap + content + template.tokenizer.hf.eos_token
            question = None
        else:
            raise UserError(f"the template {template.pattern!r} has no place for a turn of {role!r} here")
    if question is not None:
        return text + template.render(question)
    return text.removesuffix(template.tokenizer.hf.eos_token)
