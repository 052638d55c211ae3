"""A thread that answers questions as they come, whoever asks, together."""

import contextlib
import threading
import time
import zlib
from collections import Counter, deque
from collections.abc import Sequence
from concurrent.futures import Future, InvalidStateError
from types import TracebackType

import jax
import numpy as np

from derta_jax.errors import UserError
from derta_jax.evaluation.adapters.texts import Question, Reply, TextBatch
from derta_jax.evaluation.generate import REFILL, bucket
from derta_jax.evaluation.subject import Subject

GATHERING = 0.02
"""Seconds after the first question, so that those asked at the same time begin together, in a batch made for all."""


class Desk:
    """Takes questions at any time, from any thread, and answers up to `size` of them at once, first come, first served.

    The batch grows when a longer question comes, once those that are being answered are done; it never shrinks. A
    future that is cancelled frees its slot.
    """

    def __init__(self, subject: Subject, size: int):
        self._subject, self._size = subject, size
        self._waiting: deque[tuple[Future[Reply], Question]] = deque()
        self._changed = threading.Condition()
        self._batch: TextBatch | None = None
        self._open = True
        self._thread: threading.Thread | None = None

    def ask(self, question: Question) -> Future[Reply]:
        """The reply, to come. Its `result` raises what went wrong on the device."""
        future: Future[Reply] = Future()
        with self._changed:
            if not self._open:
                raise RuntimeError("the desk is closed")
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="derta answers", daemon=True)
                self._thread.start()
            self._waiting.append((future, question))
            self._changed.notify()
        return future

    def close(self) -> None:
        """Cancel what is not answered yet, and wait for the thread to end."""
        with self._changed:
            self._open = False
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()

    def __enter__(self) -> "Desk":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _work(self) -> None:
        with jax.set_mesh(self._subject.mesh):
            while self._is_needed():
                try:
                    self._go_on()
                except Exception as error:  # a dead thread would answer nobody: each who waits gets the error itself
                    self._fail(error)
        for future in [*self._in_work(), *(future for future, _ in self._waiting)]:
            future.cancel()

    def _in_work(self) -> list[Future[Reply]]:
        return self._batch.names if self._batch else []

    def _is_needed(self) -> bool:
        """Wait for a question where there is none; False when the desk is closed."""
        idle = False
        with self._changed:
            while self._open and not self._waiting and not self._in_work():
                idle = True
                self._changed.wait()
        if idle:
            time.sleep(GATHERING)
        return self._open

    def _go_on(self) -> None:
        for future in self._in_work():
            if future.cancelled() and self._batch:
                self._batch.drop(future)
        if not self._in_work():
            self._make_room()
        if self._batch is None:
            return
        if entering := self._entering(self._batch):
            _tell(self._batch.admit(entering))
        if self._batch.running:
            _tell(self._batch.advance())

    def _make_room(self) -> None:
        """A batch that the first in the queue fits into; a new one is for all who wait."""
        with self._changed:
            self._forget_cancelled()
            requests = [question.request for _, question in self._waiting]
        if not requests or (self._batch and self._batch.fits(requests[0])):
            return
        # by powers of two, so that a batch made for a long answer takes one a little longer as well
        context = bucket(max(len(request.prompt_ids) + request.max_new_tokens for request in requests))
        context = max(context, self._batch.context if self._batch else 0)
        self._batch = None  # the next needs its memory
        self._batch = TextBatch(self._subject, self._size, context)

    def _entering(self, batch: TextBatch) -> dict[Future[Reply], Question]:
        """Those from the front of the queue that fit, once it is worth a pass over their prompts."""
        with self._changed:
            self._forget_cancelled()
            if batch.free < min(len(self._waiting), max(1, self._size // REFILL)):
                return {}
            entering: dict[Future[Reply], Question] = {}
            while self._waiting and len(entering) < batch.free and batch.fits(self._waiting[0][1].request):
                future, question = self._waiting.popleft()
                entering[future] = question
            return entering

    def _fail(self, error: Exception) -> None:
        """Tell those in work, or where there are none the first in the queue, and begin with a new batch."""
        failed = self._in_work()
        if not failed:
            with self._changed:
                failed = [self._waiting.popleft()[0]] if self._waiting else []
        for future in failed:
            with contextlib.suppress(InvalidStateError):  # nobody waits any more
                future.set_exception(error)
        self._batch = None

    def _forget_cancelled(self) -> None:
        self._waiting = deque(item for item in self._waiting if not item[0].cancelled())


class Seeds:
    """A seed of its own for each time that a prompt is asked, whatever else is asked between."""

    def __init__(self, seed: int) -> None:
        if not 0 <= seed < 2**32:
            raise UserError(f"seed is {seed}: it must be at least 0 and less than 2**32")
        self._seed = seed
        self._times: Counter[int] = Counter()

    def next(self, prompt_ids: Sequence[int]) -> tuple[int, int]:
        prompt = zlib.crc32(np.array(prompt_ids, np.int32).tobytes())
        self._times[prompt] += 1
        return self._seed, zlib.crc32(f"{prompt} {self._times[prompt]}".encode())


def _tell(replies: dict[Future[Reply], Reply]) -> None:
    for future, reply in replies.items():
        with contextlib.suppress(InvalidStateError):  # nobody waits any more
            future.set_result(reply)
