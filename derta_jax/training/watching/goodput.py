"""Where the wall time of a run went, over all its attempts: the share in useful steps is its goodput."""

import contextlib
import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from derta_jax.training.pod import processes
from derta_jax.training.watching.metrics import format_seconds
from derta_jax.training.watching.mirror import Mirror

CATEGORIES = ("step", "compile", "checkpoint", "held_out", "input", "start", "load", "other", "repeated", "down")
"""`repeated`: steps done again after a restart. `down`: from an attempt's last sign of life to the next one's start."""

FILE = "goodput.jsonl"


def process_started() -> float:
    """Unix time at which this process began, by Linux; elsewhere now."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        uptime = float(Path("/proc/uptime").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return time.time()
    return time.time() - max(0.0, uptime - ticks / os.sysconf("SC_CLK_TCK"))


class Ledger:
    """The time of one attempt by category; every moment counts once, for the innermost `spending`.

    Outside of any it counts as `start` until `begin`, then as `other`. Process 0 keeps a line for each attempt in
    `goodput.jsonl` of the run directory, its own brought up to date every `interval` seconds by a thread; so little is
    lost when the process is killed. `started` is the Unix time at which the attempt began, now if not given.
    """

    def __init__(self, output: Any, started: float | None = None, interval: float = 10.0):
        self.output, self.interval = output, interval
        now = time.time()
        self.started = min(now, now if started is None else started)
        self._seconds = dict.fromkeys(CATEGORIES, 0.0) | {"start": now - self.started}
        self._since = time.monotonic()
        self._spending: list[str] = []
        self._base = "start"
        self._step = self._reached = self._repeated = 0
        self._earlier: list[dict[str, Any]] = []
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._keeper: threading.Thread | None = None

    def __enter__(self) -> "Ledger":
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        if self._keeper is not None:
            self._keeper.join()

    @contextlib.contextmanager
    def spending(self, category: str) -> Iterator[None]:
        """Count the time inside as `category`, and what is spent on something else inside as that. Main thread only."""
        with self._lock:
            self._settle()
            self._spending.append(category)
        try:
            yield
        finally:
            with self._lock:
                self._settle()
                self._spending.pop()

    def begin(self, step: int, reached: int = 0) -> None:
        """The attempt goes on after `step`. `reached`: the last step that an earlier one is known to have finished."""
        if processes.index() == 0:
            mirror = Mirror(self.output)
            mirror.pull(FILE)
            self._earlier = _read(mirror.local / FILE)
            self._keeper = threading.Thread(target=self._keep, args=(mirror,), name="derta-goodput", daemon=True)
        with self._lock:
            self._settle()
            self._base = "other"
            self._step = step
            self._reached = max([reached, *(attempt["last_step"] for attempt in self._earlier)])
        if self._keeper is not None:
            self._keeper.start()

    def finished(self, step: int) -> None:
        """A step is done; the time since the last one was `repeated` if an earlier attempt had done it."""
        with self._lock:
            self._settle()
            self._repeated += step <= self._reached
            self._step = step

    def seconds(self) -> dict[str, float]:
        """This attempt's time so far, by category."""
        with self._lock:
            self._settle()
            return dict(self._seconds)

    def summary(self) -> dict[str, Any]:
        """Of all attempts: `seconds` by category and in all, steps done again, and goodput, the share of `step`."""
        attempts = [*self._earlier, self._attempt()]
        seconds = {name: sum(attempt["seconds"][name] for attempt in attempts) for name in CATEGORIES}
        total = sum(seconds.values())
        return {
            "attempts": len(attempts),
            "total_seconds": total,
            "seconds": seconds,
            "goodput": seconds["step"] / total if total else None,
            "steps_repeated": sum(attempt["steps_repeated"] for attempt in attempts),
        }

    def _settle(self) -> None:
        now = time.monotonic()
        category = self._spending[-1] if self._spending else self._base
        if category == "step" and self._step < self._reached:
            category = "repeated"
        self._seconds[category] += now - self._since
        self._since = now

    def _attempt(self) -> dict[str, Any]:
        seconds = self.seconds()
        if self._earlier:
            seconds["down"] = max(0.0, self.started - self._earlier[-1]["alive"])
        return {
            "attempt": len(self._earlier) + 1,
            "started": self.started,
            "alive": time.time(),
            "last_step": self._step,
            "steps_repeated": self._repeated,
            "seconds": seconds,
        }

    def _keep(self, mirror: Mirror) -> None:
        """Write all attempts now, at every interval and at the end; what cannot be written is tried again later."""
        partial = mirror.local / "goodput.partial"
        closed = False
        while True:
            lines = [json.dumps(attempt) + "\n" for attempt in (*self._earlier, self._attempt())]
            # a full disk, a bucket that is not reachable just now
            with contextlib.suppress(Exception):
                partial.write_text("".join(lines), encoding="utf-8")
                os.replace(partial, mirror.local / FILE)
                mirror.push(FILE)
            if closed:
                break
            closed = self._closed.wait(self.interval)
        mirror.remove()


def format_goodput(summary: dict[str, Any]) -> str:
    """One line: `goodput   91% of 2:03:04 in steps: compile 3%, …, restarts 3% (2 attempts, 14 steps done again)`."""
    total = summary["total_seconds"] or 1.0
    seconds = {name: spent for name, spent in summary["seconds"].items() if name not in ("step", "repeated", "down")}
    shares = {name.replace("_", "-"): spent / total for name, spent in seconds.items() if spent}
    text = ", ".join(f"{name} {share:.0%}" for name, share in shares.items())
    if summary["attempts"] > 1:
        lost = (summary["seconds"]["repeated"] + summary["seconds"]["down"]) / total
        again = f"{summary['attempts']} attempts, {summary['steps_repeated']:,} steps done again"
        text += f", restarts {lost:.0%} ({again})"
    return f"goodput   {summary['seconds']['step'] / total:.0%} of {format_seconds(total)} in steps: {text}"


def _read(file: Path) -> list[dict[str, Any]]:
    """The attempts of a file; a line that a kill or a full disk cut off is left out."""
    attempts = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else []:
        with contextlib.suppress(ValueError):
            attempts.append(json.loads(line))
    return attempts
