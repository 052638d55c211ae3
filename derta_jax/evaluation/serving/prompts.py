"""Bodies → requests to the model: prompts as token ids, and how far their answers may go."""

import secrets
from collections.abc import Sequence

from derta_jax.errors import UserError
from derta_jax.evaluation.generate import Request
from derta_jax.evaluation.serving.problems import Problem
from derta_jax.evaluation.serving.protocol import Asked, ChatAsked, CompletionAsked, Message
from derta_jax.evaluation.subject import Subject

COMPLETION_TOKENS = 16
"""Of a completion that does not say how long it may be, as OpenAI has it."""


def chat_requests(asked: ChatAsked, subject: Subject, context: int) -> list[Request]:
    """One for each choice. Raises `Problem` where the template has no place for the messages, or there is no room."""
    prompt_ids = subject.tokenizer.prompt_ids(chat_text(asked.messages, asked.continue_final_message, subject))
    return _requests(asked, [prompt_ids], asked.max_completion_tokens or asked.max_tokens, context)


def completion_requests(asked: CompletionAsked, subject: Subject, context: int) -> list[Request]:
    """One for each choice of each prompt, in the order of the prompts."""
    vocabulary = subject.model.config.vocab_size
    prompts = []
    for prompt in asked.prompts:
        if isinstance(prompt, str):
            prompts.append(subject.tokenizer.prompt_ids(prompt))
            continue
        if wrong := [token for token in prompt if not 0 <= token < vocabulary]:
            raise Problem(400, f"the model has tokens 0 to {vocabulary - 1}, not {wrong[0]}", "prompt", "invalid_value")
        prompts.append(prompt)
    return _requests(asked, prompts, asked.max_tokens or COMPLETION_TOKENS, context)


def chat_text(messages: Sequence[Message], go_on: bool, subject: Subject) -> str:
    """What the model reads: the messages in its template."""
    template = subject.template
    if template.pattern == "chat":
        turns = [message.model_dump() for message in messages]
        try:
            return subject.tokenizer.chat_turns(turns, go_on)
        except UserError as error:
            raise Problem(400, str(error), "messages", "invalid_value") from error
    spoken = [message for message in messages if message.role != "system" or message.content]
    roles = [message.role for message in spoken]
    if roles == ["user"]:
        return template.render(spoken[0].content)
    if roles == ["user", "assistant"] and go_on:
        return template.render(spoken[0].content) + template.gap + spoken[1].content
    raise Problem(
        400,
        f"the model's template {template.pattern!r} has a place for one message, of the user, not for "
        f"{', '.join(roles) or 'none'}: put all into one, serve the model with --template chat, or ask /v1/completions",
        "messages",
        "invalid_value",
    )


def _requests(asked: Asked, prompts: Sequence[list[int]], limit: int | None, context: int) -> list[Request]:
    seed = secrets.randbits(32) if asked.seed is None else asked.seed % 2**32
    param = "messages" if isinstance(asked, ChatAsked) else "prompt"
    limits = [_limit(prompt_ids, limit, context, param) for prompt_ids in prompts]
    choices = [(ids, limit) for ids, limit in zip(prompts, limits, strict=True) for _ in range(asked.n)]
    return [Request(ids, limit, asked.temperature, (seed, place)) for place, (ids, limit) in enumerate(choices)]


def _limit(prompt_ids: Sequence[int], limit: int | None, context: int, param: str) -> int:
    """How many tokens the answer may have: as many as are asked for, or else as there is room for."""
    length = len(prompt_ids)
    if not length:
        raise Problem(400, "the prompt has no tokens", param, "invalid_value")
    if length + (limit or 1) > context:
        answer = f"the {limit:,} of max_tokens" if limit else "an answer"
        raise Problem(
            400,
            f"this server's context is {context:,} tokens, which the prompt's {length:,} and {answer} exceed",
            param,
            "context_length_exceeded",
        )
    return limit or context - length
