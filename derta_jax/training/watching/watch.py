"""What people see of a run: one dense line a step, a bar, and how fast it goes."""

import statistics
import time
from collections import deque
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from derta_jax.config import RunConfig
from derta_jax.models.config import ModelConfig
from derta_jax.training.watching.flops import TrainFlops, peak_flops, train_flops
from derta_jax.training.watching.goodput import Ledger
from derta_jax.training.watching.metrics import Lap, format_seconds
from derta_jax.training.watching.sinks import Record, plain

NOT_A_STEP = ("compile", "checkpoint", "held_out")
"""Spent between the ends of two steps, but no part of the second one."""

MEMORY_SECONDS = 1.0


class Meter(NamedTuple):
    """What tokens and seconds are turned into speeds with. `peak` is a chip's FLOP/s, None where unknown."""

    flops: TrainFlops
    peak: float | None
    chips: int

    @classmethod
    def of(cls, config: RunConfig, model: ModelConfig, mesh: Mesh) -> "Meter":
        kind = mesh.devices.flat[0].device_kind
        return cls(train_flops(model, config.lora), peak_flops(kind, config.train.dtype), mesh.size)

    def speeds(self, record: Record, seconds: float) -> dict[str, float | None]:
        """Tokens/s/chip and MFU, if a step like that of `record` takes so many seconds."""
        flops = self.flops.of(record["useful_tokens"], record["labelled_tokens"], record["attended_tokens"])
        chip_seconds = seconds * self.chips
        return {
            "tokens_per_second_per_chip": record["tokens"] / chip_seconds,
            "useful_tokens_per_second_per_chip": record["useful_tokens"] / chip_seconds,
            "mfu": flops / chip_seconds / self.peak if self.peak else None,
        }


class Watch:
    """Progress for people: a live bar in a terminal, and a line now and then everywhere; measures the steps.

    For each step: `lap`, then `measured` on its record, then `show`.
    """

    def __init__(
        self, console: Console, start: int, steps: int, seconds_between_lines: float, ledger: Ledger, meter: Meter
    ):
        self.steps, self.console, self.seconds_between_lines = steps, console, seconds_between_lines
        self.ledger, self.meter = ledger, meter
        self.last: Record | None = None
        self.shown = 0
        self.recent: deque[float] = deque(maxlen=50)
        self.started = time.monotonic()
        self.last_line = self.memory_read = float("-inf")
        self.memory: dict[str, int | None] = {}
        self.spent = Lap(0.0)
        columns = (
            TextColumn("train"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self.bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self.task = self.bar.add_task("train", total=steps, completed=start)

    def __enter__(self) -> "Watch":
        self.bar.start()
        self.lap()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def lap(self) -> Lap:
        """Since the last one, by the ledger: seconds without those of `NOT_A_STEP`, and those spent on input."""
        spent = self.ledger.seconds()
        before = self.spent
        self.spent = Lap(sum(spent[name] for name in spent if name not in NOT_A_STEP), spent["input"])
        return Lap(self.spent.seconds - before.seconds, self.spent.input_seconds - before.input_seconds)

    def measured(self, record: Record) -> Record:
        """The record with its speeds, and the memory of the fullest of this process's chips (read once a second)."""
        now = time.monotonic()
        if now - self.memory_read >= MEMORY_SECONDS:
            self.memory_read, self.memory = now, device_memory()
        return record | self.meter.speeds(record, record["seconds"]) | self.memory

    def show(self, record: Record) -> None:
        if self.shown:
            # the first step compiles: it says nothing about the others
            self.recent.append(record["seconds"])
        self.last = record
        self.shown += 1
        self.bar.update(self.task, completed=record["step"])
        now = time.monotonic()
        if self.shown == 1 or record["step"] == self.steps or now - self.last_line > self.seconds_between_lines:
            self.last_line = now
            eta = self.step_seconds * (self.steps - record["step"]) if self.recent else None
            self.console.print(format_record(record, self.steps, eta), highlight=False, soft_wrap=True)

    @property
    def step_seconds(self) -> float:
        """The median of the last 50 steps, the first one left out where there are others."""
        return statistics.median(self.recent or [self.last["seconds"] if self.last else 0.0])

    def summary(self) -> dict[str, Any]:
        """Figures of this attempt; speeds are those of its last step's tokens in the median step's seconds."""
        if self.last is None:
            return {"step_seconds": None, "loss": None}
        last, step_seconds = self.last, self.step_seconds
        names = ("tokens", "useful_tokens", "labelled_tokens")
        rates = {f"{name}_per_second": last[name] / step_seconds for name in names}
        seconds = time.monotonic() - self.started
        self.console.print(f"done      in {format_seconds(seconds)}, loss {last['loss']:.4f}", highlight=False)
        figures = {
            "loss": last["loss"],
            "seconds": seconds,
            "step_seconds": step_seconds,
            **rates,
            **self.meter.speeds(last, step_seconds),
            "skipped_total": last["skipped_total"],
            "hbm_peak_bytes": last["hbm_peak_bytes"],
        }
        return plain(figures)


def device_memory() -> dict[str, int | None]:
    """Bytes of the fullest of this process's devices: in use, most so far, and all there are; None on a CPU."""
    keys = {"hbm_bytes": "bytes_in_use", "hbm_peak_bytes": "peak_bytes_in_use", "hbm_limit_bytes": "bytes_limit"}
    stats = [stats for device in jax.local_devices() if (stats := device.memory_stats())]
    fullest: dict[str, int] = max(stats, key=lambda stat: stat["bytes_in_use"], default={})
    return {name: fullest.get(key) for name, key in keys.items()}


def format_record(record: Record, steps: int, eta_seconds: float | None) -> str:
    """One dense line: `step 12/1032  eta 1:02:03  loss 1.234 (mle 1.100, rto 2.345) …`."""
    parts_of_loss = {name: value for name, value in record.items() if name.startswith("loss_") and value is not None}
    kinds = ", ".join(f"{name.removeprefix('loss_')} {value:.4f}" for name, value in parts_of_loss.items())
    useful, padded = record["useful_tokens_per_second_per_chip"], record["tokens_per_second_per_chip"]
    parts = [
        f"step {record['step']:>{len(str(steps))}}/{steps}",
        f"eta {'-' if eta_seconds is None else format_seconds(eta_seconds)}",
        f"loss {record['loss']:.4f} ({kinds})",
        f"grad {record['grad_norm']:.3g}",
        f"lr {record['lr']:.2e}",
        f"{record['seconds'] * 1000:,.0f} ms",
        f"tokens/s/chip {useful:,.0f} useful, {padded:,.0f} padded",
    ]
    if record["mfu"] is not None:
        parts.append(f"MFU {record['mfu']:.1%}")
    if record["hbm_bytes"] is not None:
        used, peak, limit = (record[f"hbm_{name}bytes"] for name in ("", "peak_", "limit_"))
        of = f"/{limit / 2**30:.1f}" if limit else ""
        parts.append(f"HBM {used / 2**30:.1f}{of} GiB" + (f", peak {peak / 2**30:.1f}" if peak else ""))
    parts.append(f"input {record['input_seconds'] / record['seconds']:.0%}")
    if record["skipped_total"]:
        parts.append(f"skipped {record['skipped_total']}")
    return "  ".join(parts)
