"""Where records go: JSON lines, TensorBoard's event files, Weights & Biases."""

import importlib.util
import io
import json
import math
import os
import time
import uuid
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np

from derta_jax.errors import UserError

Record = dict[str, Any]

FILES = {"train": "metrics.jsonl", "held_out": "held_out.jsonl"}
"""The kinds of records, and the file of each in a run directory."""


class Sink(Protocol):
    """Takes records; what `flush` cannot get rid of (one of `failures`) is kept for the next `flush`."""

    name: str
    failures: tuple[type[Exception], ...]

    def write(self, kind: str, record: Record) -> None: ...

    def flush(self, thoroughly: bool) -> None: ...

    def close(self) -> None: ...


class JsonLines:
    """One object a line, in `FILES`; what is not a finite number is null."""

    name = "metrics.jsonl"
    failures: tuple[type[Exception], ...] = (OSError,)

    def __init__(self, directory: Path):
        self._directory = directory
        self._files: dict[str, io.RawIOBase] = {}
        self._pending = {kind: bytearray() for kind in FILES}

    def write(self, kind: str, record: Record) -> None:
        self._pending[kind] += json.dumps(plain(record), allow_nan=False).encode() + b"\n"

    def flush(self, thoroughly: bool) -> None:
        for kind, pending in self._pending.items():
            while pending:
                if kind not in self._files:
                    # unbuffered: after a full disk we know how much of a line is written
                    self._files[kind] = (self._directory / FILES[kind]).open("ab", buffering=0)
                del pending[: self._files[kind].write(pending)]

    def close(self) -> None:
        for file in self._files.values():
            file.close()


class TensorBoard:
    """Scalars under `train/` and `held_out/`, all of a record in one event: one by one they cost milliseconds a step.

    Events of earlier attempts from `resumed_step` on are hidden. After a failed write a new file is begun.
    """

    name = "tensorboard"
    failures: tuple[type[Exception], ...] = (OSError,)

    def __init__(self, directory: Path, resumed_step: int):
        self._directory, self._first_step = directory, resumed_step + 1
        self._pending: deque[tuple[float, str, Record]] = deque()
        self._events: Any = None

    def write(self, kind: str, record: Record) -> None:
        self._pending.append((time.time(), kind, record))

    def flush(self, thoroughly: bool) -> None:
        from tensorboardX.proto.event_pb2 import Event  # imports torch where there is one: seconds
        from tensorboardX.proto.summary_pb2 import Summary

        try:
            while self._pending:
                when, kind, record = self._pending[0]
                values = [Summary.Value(tag=f"{kind}/{tag}", simple_value=value) for tag, value in scalars(record)]
                self._open().write_event(Event(wall_time=when, step=record["step"], summary=Summary(value=values)))
                self._pending.popleft()
                self._first_step = record["step"] + 1
            if thoroughly and self._events is not None:
                self._events.flush()
        except OSError:
            self._events = None
            raise

    def close(self) -> None:
        if self._events is not None:
            self._events.close()

    def _open(self) -> Any:
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        if self._events is None:
            self._directory.mkdir(parents=True, exist_ok=True)
            events = EventsWriter(str(self._directory / "events"), f".{time.time_ns()}")
            start = Event(step=self._first_step, session_log=SessionLog(status=SessionLog.START))
            events.write_event(start)
            self._events = events
        return self._events


class Wandb:
    """A run at Weights & Biases. All attempts of a run go on in the same one, whose id lies in the run directory."""

    name = "Weights & Biases"
    failures: tuple[type[Exception], ...] = (Exception,)
    ID_FILE: ClassVar[str] = "wandb_id"

    def __init__(self, directory: Path, project: str, name: str, config: Mapping[str, Any]):
        check_wandb()
        import wandb

        id_file = directory / self.ID_FILE
        if not id_file.is_file():
            id_file.write_text(uuid.uuid4().hex[:16], encoding="utf-8")
        try:
            self._run = wandb.init(
                project=project,
                id=id_file.read_text(encoding="utf-8").strip(),
                name=name,
                resume="allow",
                dir=directory,
                config=dict(config),
                settings=wandb.Settings(console="off"),
            )
        except wandb.errors.Error as error:
            raise UserError(
                f"watch.wandb: cannot start a run at Weights & Biases: {error}; log in with `wandb login`, "
                "or set WANDB_MODE=offline"
            ) from error
        # not W&B's own count of steps, which refuses those that are done again
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, kind: str, record: Record) -> None:
        self._run.log({"step": record["step"]} | {f"{kind}/{tag}": value for tag, value in scalars(record)})

    def flush(self, thoroughly: bool) -> None:
        pass

    def close(self) -> None:
        self._run.finish()


def check_wandb() -> None:
    """Raises `UserError` where the package is missing."""
    spec = importlib.util.find_spec("wandb")
    # a folder that W&B wrote into is no package
    if spec is None or spec.origin is None:
        raise UserError("watch.wandb needs Weights & Biases' package: pip install 'derta-jax[wandb]', or leave it null")


def scalars(record: Record) -> list[tuple[str, float]]:
    """The finite numbers of a record by name, its step left out."""
    return [
        (name, float(value))
        for name, value in record.items()
        if name != "step" and isinstance(value, bool | int | float | np.number) and math.isfinite(value)
    ]


def plain(value: Any) -> Any:
    """A record as JSON can hold it: numpy's numbers and arrays as Python's, None for what is not finite."""
    if isinstance(value, Mapping):
        return {name: plain(inner) for name, inner in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def keep_until(file: Path, step: int) -> int:
    """Drop the lines of steps after `step`, which will be done again, all where it is 0, and one cut off by a kill.

    Returns the last step that was there, 0 if none was.
    """
    if not file.is_file():
        return 0
    kept, last = [], 0
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        number = _step_of(line)
        if number is not None:
            last = max(last, number)
            if number <= step and step > 0:
                kept.append(line)
    partial = file.with_suffix(".partial")
    partial.write_text("".join(kept), encoding="utf-8")
    os.replace(partial, file)
    return last


def _step_of(line: str) -> int | None:
    try:
        return int(json.loads(line)["step"]) if line.endswith("\n") else None
    except (ValueError, KeyError, TypeError):
        return None
