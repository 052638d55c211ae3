"""What the engine's thread tells of several requests, as pieces of text in the event loop."""

import asyncio
import contextlib
import dataclasses
import functools
from collections.abc import AsyncIterator, Sequence

from derta_jax.evaluation.generate import News, Request
from derta_jax.evaluation.serving.engine import Broken, Closing, Engine, Job, NoRoom
from derta_jax.evaluation.serving.problems import Problem
from derta_jax.evaluation.serving.text import AnswerText
from derta_jax.interop.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Piece:
    """More text of a choice; with `finish_reason`, `stop` or `length`, it is the last."""

    choice: int
    text: str
    finish_reason: str | None


class Answering:
    """Requests on their way through the engine, one for each choice; `cancel` when nobody waits for them any more.

    To be made in the event loop. Raises `Problem` where the engine does not take them.
    """

    def __init__(self, engine: Engine, tokenizer: Tokenizer, requests: Sequence[Request], stops: Sequence[str]):
        self._engine = engine
        self._loop = asyncio.get_running_loop()
        self._told: asyncio.Queue[tuple[int, News | Broken]] = asyncio.Queue()
        self._texts = [AnswerText(tokenizer, stops) for _ in requests]
        self._jobs = [Job(request, functools.partial(self._tell, choice)) for choice, request in enumerate(requests)]
        if len(requests) > engine.places:
            raise Problem(400, f"at most {engine.places} choices at a time, not {len(requests)}", "n", "invalid_value")
        try:
            engine.submit(self._jobs)
        except Closing:
            raise _broken("stopping") from None
        except NoRoom:
            raise Problem(429, "too many requests are waiting: try again later", code="queue_full") from None

    @property
    def choices(self) -> int:
        return len(self._jobs)

    @property
    def tokens(self) -> int:
        """Of all answers so far."""
        return sum(text.tokens for text in self._texts)

    def cancel(self) -> None:
        self._engine.cancel(self._jobs)

    async def pieces(self) -> AsyncIterator[Piece]:
        """The pieces of all answers as they come; raises `Problem` if one of them breaks off."""
        unfinished = set(range(self.choices))
        while unfinished:
            choice, news = await self._told.get()
            if isinstance(news, Broken):
                raise _broken(news.why)
            if choice not in unfinished:
                continue
            piece = self._piece(choice, news)
            if piece.finish_reason:
                unfinished.discard(choice)
            yield piece

    def _piece(self, choice: int, news: News) -> Piece:
        text = self._texts[choice]
        new = text.add(news.token_ids)
        if text.stopped:
            self._engine.cancel([self._jobs[choice]])
            return Piece(choice, new, "stop")
        if news.finish_reason is None:
            return Piece(choice, new, None)
        new += text.finish()
        return Piece(choice, new, "stop" if text.stopped else news.finish_reason)

    def _tell(self, choice: int, news: News | Broken) -> None:
        with contextlib.suppress(RuntimeError):  # the server was stopped at once: nobody listens
            self._loop.call_soon_threadsafe(self._told.put_nowait, (choice, news))


def _broken(why: str) -> Problem:
    if why == "stopping":
        return Problem(503, "the server is stopping", code=why)
    return Problem(500, "the model failed on this request: the server's log says why", code=why)
