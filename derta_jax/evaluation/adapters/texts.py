"""A batch of requests whose answers are texts that also end before given strings."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from derta_jax.evaluation.generate import Batch, News, Request
from derta_jax.evaluation.subject import Subject
from derta_jax.interop.tokenizer import Tokenizer

MARGIN = 4
"""Tokens beside those that can hold a string: some have no text of their own."""


@dataclasses.dataclass(frozen=True)
class Question:
    """A request whose answer ends before the first of `stops`, too."""

    request: Request
    stops: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Reply:
    """`text` without what stopped it; `tokens` were made for it; `finish_reason` is `stop` or `length`."""

    text: str
    tokens: int
    finish_reason: str


class TextBatch:
    """Questions that are answered together, each of at most `context` tokens of a prompt and its answer."""

    def __init__(self, subject: Subject, size: int, context: int):
        self.context = context
        self._tokenizer = subject.tokenizer
        self._batch = Batch(subject.model, subject.params, subject.stop_ids, size, context)
        self._asked: dict[Any, Question] = {}
        self._made: dict[Any, list[int]] = {}

    @property
    def free(self) -> int:
        return self._batch.free

    @property
    def running(self) -> bool:
        return self._batch.running

    @property
    def names(self) -> list[Any]:
        return list(self._asked)

    def fits(self, request: Request) -> bool:
        return len(request.prompt_ids) + request.max_new_tokens <= self.context

    def admit(self, questions: Mapping[Any, Question]) -> dict[Any, Reply]:
        """As many as are `free`; returns the replies that are complete, as `advance` does."""
        self._asked |= questions
        self._made |= {name: [] for name in questions}
        return self._replies(self._batch.admit({name: question.request for name, question in questions.items()}))

    def advance(self) -> dict[Any, Reply]:
        """A few more tokens for each question."""
        return self._replies(self._batch.advance())

    def drop(self, name: Any) -> None:
        """Nobody waits for this reply any more."""
        self._batch.drop(name)
        self._forget(name)

    def _replies(self, news: Sequence[News]) -> dict[Any, Reply]:
        replies = {}
        for item in news:
            made, stops = self._made[item.name], self._asked[item.name].stops
            made += item.token_ids
            stopped = _stopped(self._tokenizer, made, len(item.token_ids), stops)
            if item.finish_reason is None and not stopped:
                continue
            text = cut(self._tokenizer.decode(made), stops)
            replies[item.name] = Reply(text, len(made), "stop" if stopped else item.finish_reason or "stop")
            if item.finish_reason is None:
                self._batch.drop(item.name)
            self._forget(item.name)
        return replies

    def _forget(self, name: Any) -> None:
        del self._asked[name], self._made[name]


def cut(text: str, stops: Sequence[str]) -> str:
    """The text before the first of `stops`."""
    return min((text.split(stop, 1)[0] for stop in stops), key=len, default=text)


def _stopped(tokenizer: Tokenizer, made: Sequence[int], new: int, stops: Sequence[str]) -> bool:
    """Whether one of `stops` is in the text, that was in none before the `new` last tokens."""
    if not stops:
        return False
    longest = max(len(stop.encode()) for stop in stops)
    tail = tokenizer.decode(made[-(new + longest + MARGIN) :])
    return any(stop in tail for stop in stops)
