"""Answers as OpenAI's clients expect them: one object, or chunks of a stream."""

import dataclasses
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

from derta_jax.evaluation.serving.answering import Answering, Piece
from derta_jax.evaluation.serving.problems import Problem, to_json

Choice = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Form:
    """What sets chat and completions apart: the objects' names, and a choice of each from (text, finish reason)."""

    prefix: str
    whole: str
    chunk: str
    choice: Callable[[str, str | None], Choice]
    delta: Callable[[str, str | None], Choice]
    opening: Choice | None


def _completion_choice(text: str, finish_reason: str | None) -> Choice:
    return {"text": text, "logprobs": None, "finish_reason": finish_reason}


def _chat_choice(text: str, finish_reason: str | None) -> Choice:
    message = {"role": "assistant", "content": text, "refusal": None}
    return {"message": message, "logprobs": None, "finish_reason": finish_reason}


def _chat_delta(text: str, finish_reason: str | None) -> Choice:
    return {"delta": {"content": text} if text else {}, "logprobs": None, "finish_reason": finish_reason}


CHAT = Form(
    prefix="chatcmpl",
    whole="chat.completion",
    chunk="chat.completion.chunk",
    choice=_chat_choice,
    delta=_chat_delta,
    opening={"delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None},
)
COMPLETION = Form(
    prefix="cmpl",
    whole="text_completion",
    chunk="text_completion",
    choice=_completion_choice,
    delta=_completion_choice,
    opening=None,
)


@dataclasses.dataclass(frozen=True)
class Reply:
    """How `answering` is told: by which model, in which form; `prompt_tokens` count each prompt once."""

    answering: Answering
    form: Form
    model: str
    prompt_tokens: int
    include_usage: bool = False

    async def whole(self) -> AsyncIterator[bytes]:
        """One object, when all answers are there."""
        texts = [""] * self.answering.choices
        reasons: list[str | None] = [None] * self.answering.choices
        async for piece in self.answering.pieces():
            texts[piece.choice] += piece.text
            reasons[piece.choice] = piece.finish_reason
        choices = [
            {"index": index, **self.form.choice(text, reason)}
            for index, (text, reason) in enumerate(zip(texts, reasons, strict=True))
        ]
        yield to_json({**self._head(self.form.whole), "choices": choices, "usage": self._usage()})

    async def stream(self) -> AsyncIterator[bytes]:
        """Server-sent events; an error that comes this late is one of them, and then the stream ends."""
        head = self._head(self.form.chunk) | ({"usage": None} if self.include_usage else {})

        def chunk(index: int, choice: Choice) -> bytes:
            return _event({**head, "choices": [{"index": index, **choice}]})

        try:
            if self.form.opening:
                for index in range(self.answering.choices):
                    yield chunk(index, self.form.opening)
            async for piece in self.answering.pieces():
                for choice in self._deltas(piece):
                    yield chunk(piece.choice, choice)
        except Problem as problem:
            yield _event(problem.as_json())
            return
        if self.include_usage:
            yield _event({**head, "choices": [], "usage": self._usage()})
        yield b"data: [DONE]\n\n"

    def _deltas(self, piece: Piece) -> list[Choice]:
        """What is said, and in a chunk of its own that it was the last."""
        said = [self.form.delta(piece.text, None)] if piece.text else []
        return [*said, self.form.delta("", piece.finish_reason)] if piece.finish_reason else said

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": f"{self.form.prefix}-{uuid.uuid4().hex}",
            "object": kind,
            "created": int(time.time()),
            "model": self.model,
        }

    def _usage(self) -> dict[str, int]:
        made = self.answering.tokens
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": made,
            "total_tokens": self.prompt_tokens + made,
        }


def _event(value: Mapping[str, Any]) -> bytes:
    return b"data: " + to_json(value) + b"\n\n"
