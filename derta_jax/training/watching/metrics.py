"""A run's figures: one JSON object a step in `metrics.jsonl`, the same scalars in TensorBoard and Weights & Biases."""

import contextlib
import queue
import threading
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console

from derta_jax.objectives.objective import Mean, mean_of
from derta_jax.training.pod import processes
from derta_jax.training.watching.mirror import Mirror
from derta_jax.training.watching.sinks import FILES, JsonLines, Record, Sink, TensorBoard, Wandb, keep_until


class Lap(NamedTuple):
    """Seconds from the end of the last step to the end of this one, and those of them spent waiting for input."""

    seconds: float
    input_seconds: float = 0.0


def step_record(
    step: int,
    sums: Mapping[str, Any],
    batch: Mapping[str, np.ndarray],
    lap: Lap,
    window: int | None = None,
) -> Record:
    """The figures of one step, DESIGN's names, and the objective's own: means, None where there was nothing to count.
    `loss_aux` is a mixture's load-balancing loss before its weight: the experts of a token, when the load is even.

    `tokens` counts all positions that were computed, `useful_tokens` those that are not padding; `attended_tokens` is
    how many tokens a useful one attends to on average, itself included, at most the sliding `window`.
    """
    values = {name: float(value) for name, value in sums.items() if not isinstance(value, Mean)}
    useful = batch["segment_ids"] > 0
    useful_tokens = int(np.count_nonzero(useful))
    before = np.minimum(batch["positions"], (window or np.iinfo(np.int32).max) - 1)

    skipped = bool(values["skipped"])
    return {
        "step": step,
        "loss": values["loss_sum"] / values["weight_sum"],
        **{name: mean_of(value) for name, value in sums.items() if isinstance(value, Mean)},
        "grad_norm": values["grad_norm"],
        "lr": values["learning_rate"],
        "skipped": skipped,
        "skipped_total": step - 1 - int(values["updates"]) + skipped,
        "tokens": int(useful.size),
        "useful_tokens": useful_tokens,
        "labelled_tokens": int(np.count_nonzero(batch["keep"])),
        "attended_tokens": 1 + int(before.sum(where=useful, dtype=np.int64)) / useful_tokens,
        "seconds": lap.seconds,
        "input_seconds": lap.input_seconds,
    }


def format_seconds(seconds: float) -> str:
    """`1:02:03`, or `2:03` below an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


_SYNC, _CLOSE = object(), object()


class MetricsWriter:
    """Appends to `metrics.jsonl`, `held_out.jsonl` and `tensorboard/` of a run directory, and to a project at W&B.

    What earlier attempts wrote after `resumed_step` is dropped, as those steps are done again; `reached` is the last of
    them. A thread writes: a step costs microseconds. What cannot be written, on a full disk or without a network, is
    said once, kept, and tried again with the next record; it does not stop the run. Of several processes the first
    writes, in the others all this does nothing.
    """

    def __init__(
        self,
        output: Any,
        resumed_step: int,
        console: Console,
        wandb: str | None = None,
        config: Mapping[str, Any] | None = None,
    ):
        self.reached = resumed_step
        self._console = console
        self._queue: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._error: BaseException | None = None
        self._troubles: set[str] = set()
        self._thread: threading.Thread | None = None
        if processes.index() > 0:
            return
        self._mirror = Mirror(output)
        self._mirror.pull(*FILES.values(), Wandb.ID_FILE)
        for name in FILES.values():
            self.reached = max(self.reached, keep_until(self._mirror.local / name, resumed_step))
        online = [Wandb(self._mirror.local, wandb, self._mirror.output.name, config or {})] if wandb is not None else []
        self._mirror.push(Wandb.ID_FILE)
        board = TensorBoard(self._mirror.local / "tensorboard", resumed_step)
        self._sinks: list[Sink] = [JsonLines(self._mirror.local), board, *online]
        self._thread = threading.Thread(target=self._work, name="derta-metrics", daemon=True)
        self._thread.start()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write(self, record: Record) -> None:
        """The figures of a train step."""
        self._put(("train", record))

    def write_held_out(self, record: Record) -> None:
        """Those of held-out examples after `record["step"]` steps; what is not a number goes to the file only."""
        self._put(("held_out", record))

    def sync(self) -> None:
        """Have all that was written so far on disk, and in the bucket if the run directory is in one. Does not wait."""
        self._put(_SYNC)

    def close(self) -> None:
        """Write and copy the rest, and wait for it."""
        if self._thread is None:
            return
        self._queue.put(_CLOSE)
        self._thread.join()
        self._thread = None
        if self._error is not None:
            raise self._error
        if self._troubles:
            self._say(f"{', '.join(sorted(self._troubles))} lack figures; what there is lies in {self._mirror.local}")
        else:
            self._mirror.remove()

    def _put(self, item: Any) -> None:
        if self._error is not None:
            raise self._error
        if self._thread is not None:
            self._queue.put(item)

    def _work(self) -> None:
        try:
            closing = False
            while not closing:
                items = self._take()
                closing = _CLOSE in items
                for sink in self._sinks:
                    with self._trouble(sink.name, sink.failures):
                        for item in items:
                            if isinstance(item, tuple):
                                sink.write(*item)
                        sink.flush(thoroughly=closing or _SYNC in items)
                if closing or _SYNC in items:
                    with self._trouble(str(self._mirror.output), (Exception,)):
                        self._mirror.push(*FILES.values(), Wandb.ID_FILE, "tensorboard")
        except BaseException as error:
            self._error = error
        for sink in self._sinks:
            with contextlib.suppress(*sink.failures):
                sink.close()

    def _take(self) -> list[Any]:
        """All that waits, at least one."""
        items = [self._queue.get()]
        with contextlib.suppress(queue.Empty):
            while True:
                items.append(self._queue.get_nowait())
        return items

    @contextlib.contextmanager
    def _trouble(self, name: str, failures: tuple[type[Exception], ...]) -> Iterator[None]:
        """Say once that something cannot be written, and go on."""
        try:
            yield
            self._troubles.discard(name)
        except failures as error:
            if name not in self._troubles:
                self._troubles.add(name)
                self._say(f"cannot write to {name} ({error}); training goes on, and this is tried again")

    def _say(self, text: str) -> None:
        self._console.print(f"figures   {text}", style="yellow", highlight=False, soft_wrap=True)
