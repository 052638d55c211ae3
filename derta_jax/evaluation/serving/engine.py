"""One thread owns the devices: requests wait in line, take slots as these get free, and are told their tokens.

Whatever else the server does, requests join while others run, and leave when nobody waits for them any more.
"""

import dataclasses
import itertools
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal

import jax
from jax.sharding import Mesh

from derta_jax.evaluation.generate import Batch, News, Request, bucket

logger = logging.getLogger(__name__)


class NoRoom(Exception):
    """As many requests wait as may."""


class Closing(Exception):
    """No more requests are taken."""


@dataclasses.dataclass(frozen=True)
class Broken:
    """Told to a job that gets no more tokens: the devices failed it, or the server stops."""

    why: Literal["failed", "stopping"]


@dataclasses.dataclass(frozen=True, eq=False)
class Job:
    """A request, and who is told of it: `tell` is called in the engine's thread and must not wait for anything."""

    request: Request
    tell: Callable[[News | Broken], None]


@dataclasses.dataclass(frozen=True)
class Load:
    """How many requests have a slot, and how many wait for one, of how many slots."""

    running: int
    waiting: int
    slots: int


class Engine:
    """Runs jobs in the slots of the batch that `new_batch` makes on `mesh`; at most `queue` more may wait."""

    def __init__(self, new_batch: Callable[[], Batch], mesh: Mesh, queue: int):
        self._new_batch, self._mesh = new_batch, mesh
        with jax.set_mesh(mesh):
            self._batch = new_batch()
        self._slots = self._batch.size
        self._places = self._slots + queue
        self._changed = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._running: set[Job] = set()
        self._gone: set[Job] = set()
        self._deadline: float | None = None
        self.failure: BaseException | None = None

    def warm_up(self, lengths: Iterable[int]) -> None:
        """Compile what prompts of these lengths need, before `start`."""
        with jax.set_mesh(self._mesh):
            for length in sorted({bucket(length): length for length in lengths}.values()):
                self._batch.admit({length: Request([0] * length, max_new_tokens=2)})
                if self._batch.running:
                    self._batch.drop(length)
                self._batch.advance()

    def start(self, when_over: Callable[[], None] = lambda: None) -> None:
        """Begin; `when_over` is called when the last job is done after `close`, or when the devices are lost."""
        self._thread = threading.Thread(target=self._work, args=(when_over,), name="engine")
        self._thread.start()

    def submit(self, jobs: Sequence[Job]) -> None:
        """Take all jobs, or none: raises `NoRoom` or `Closing`."""
        with self._changed:
            if self.closing:
                raise Closing
            if len(self._waiting) + len(self._running) + len(jobs) > self._places:
                raise NoRoom
            self._waiting.extend(jobs)
            self._changed.notify()

    def cancel(self, jobs: Iterable[Job]) -> None:
        """Nobody waits for these jobs any more; those that are done are passed over."""
        with self._changed:
            for job in jobs:
                if job in self._running:
                    self._gone.add(job)
                elif job in self._waiting:
                    self._waiting.remove(job)

    def close(self, grace: float = math.inf) -> None:
        """Take no more jobs, and finish those that are there within `grace` seconds."""
        with self._changed:
            self._deadline = time.monotonic() + grace
            self._changed.notify()

    def join(self) -> None:
        """Wait until the thread has ended."""
        self._thread.join()

    @property
    def closing(self) -> bool:
        return self._deadline is not None

    @property
    def places(self) -> int:
        """How many jobs there may be at a time, with a slot or without."""
        return self._places

    @property
    def load(self) -> Load:
        with self._changed:
            return Load(len(self._running), len(self._waiting), self._slots)

    def _work(self, when_over: Callable[[], None]) -> None:
        try:
            with jax.set_mesh(self._mesh):
                while self._turn():
                    pass
        except BaseException as error:
            logger.exception("the devices are lost")
            self.failure = error
        finally:
            self.close(0)
            self._end_all("failed" if self.failure else "stopping", [*self._running, *self._waiting])
            when_over()

    def _turn(self) -> bool:
        """Let some jobs go and others in, and make a few tokens for each; whether there is more to do."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._running or self.closing)
            late = self._deadline is not None and time.monotonic() >= self._deadline
            if late or not (self._waiting or self._running):
                return False
            gone, self._gone = self._gone, set()
            self._running -= gone
            free = self._slots - len(self._running)
            entering = [self._waiting.popleft() for _ in range(min(free, len(self._waiting)))]
            self._running |= set(entering)
        try:
            for job in gone:
                self._batch.drop(job)
            for news in self._news(entering):
                if news.finish_reason:
                    with self._changed:
                        self._running.discard(news.name)
                        self._gone.discard(news.name)
                news.name.tell(news)
            return True
        except Exception:  # out of memory or worse: those who wait are told, and the next request may be smaller
            logger.exception("the devices failed on %d requests", len(self._running))
        self._end_all("failed", [*self._running])
        del self._batch  # what it holds goes before the next one comes
        self._batch = self._new_batch()
        return True

    def _news(self, entering: Sequence[Job]) -> Iterator[News]:
        for jobs in alike(entering, max(1, self._slots // 2)):
            yield from self._batch.admit({job: job.request for job in jobs})
        if self._batch.running:
            yield from self._batch.advance()

    def _end_all(self, why: Literal["failed", "stopping"], jobs: Iterable[Job]) -> None:
        with self._changed:
            for job in jobs:
                if job in self._running:
                    self._running.discard(job)
                    self._gone.discard(job)
                else:
                    self._waiting.remove(job)
        for job in jobs:
            job.tell(Broken(why))


def alike(jobs: Sequence[Job], most: int) -> Iterator[list[Job]]:
    """Jobs whose prompts are padded to the same length, the shortest first, at most so many at a time.

    Half of a batch's slots at a time is one program for each padded length; all of them would be a second one.
    """

    def length(job: Job) -> int:
        return bucket(len(job.request.prompt_ids))

    for _, group in itertools.groupby(sorted(jobs, key=length), key=length):
        while some := list(itertools.islice(group, most)):
            yield some
