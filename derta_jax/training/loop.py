"""The training loop: dispatch a step, watch it, save, and stop cleanly when asked to.

Resume precedence: the newest whole checkpoint in `train.output` if there is one, else `model.path`.
"""

import contextlib
import json
import signal
import statistics
import time
from collections import deque
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from derta_jax.config import RunConfig, dump_config
from derta_jax.errors import StoppedEarly
from derta_jax.interop.hf_export import copy_model_files
from derta_jax.models.lora import DEFAULT, Adapter, adapter_variables, init_adapter
from derta_jax.models.quantise import quantise
from derta_jax.training.checkpoint import Checkpoints
from derta_jax.training.metrics import MetricsWriter, Record, format_record, format_seconds, step_record
from derta_jax.training.optimizer import learning_rate_schedule
from derta_jax.training.progress import load_with_progress
from derta_jax.training.run import Run, describe, prepare_run
from derta_jax.training.step import TrainState, init_state, to_devices


def train(
    config: RunConfig, console: Console, dry_run: bool = False, seconds_between_lines: float = 2.0
) -> dict[str, Any]:
    """Train, resuming where the output directory left off; returns the summary that is also written there.

    Raises `UserError` for bad input, before anything is compiled, and `StoppedEarly` after Ctrl-C or SIGTERM, saved.
    """
    run = prepare_run(config, console)
    console.print(describe(run), highlight=False, soft_wrap=True)
    if dry_run:
        return {}
    run.output.mkdir(parents=True, exist_ok=True)
    with Checkpoints(run.output / "checkpoints", config.checkpoint.keep) as checkpoints:
        state = _first_state(run, checkpoints, console)
        summary = run.output / "summary.json"
        if int(state.step) == run.batches.steps and summary.is_file():
            console.print("finished  there is nothing left to do")
            return json.loads(summary.read_text(encoding="utf-8"))
        (run.output / "config.yaml").write_text(dump_config(run.config), encoding="utf-8")
        copy_model_files(run.source.files, run.output / "model")
        frozen = _frozen_variables(run, console)
        watching = _Watch(console, int(state.step), run.batches.steps, seconds_between_lines)
        with jax.set_mesh(run.mesh), watching as watch:
            return _train_from(run, state, frozen, checkpoints, watch)


def _first_state(run: Run, checkpoints: Checkpoints, console: Console) -> TrainState:
    """The state to go on from."""
    step = checkpoints.latest_step
    if step is not None:
        state = checkpoints.restore(step, run.abstract_state, run.identity)
        console.print(f"resumed   at step {step:,} of {run.batches.steps:,} from {checkpoints.directory}")
        return state
    if run.config.lora is not None:
        fresh = init_adapter(run.abstract_trainable, run.config.train.seed)
    else:
        fresh = {"params": load_with_progress(run.source, "float32", run.mesh, console)}
    return init_state(fresh, run.optimizer, run.shardings)


def _frozen_variables(run: Run, console: Console) -> dict[str, Any]:
    """What adapters go on, and their scales; nothing where all parameters are trained."""
    lora = run.config.lora
    if lora is None:
        return {}
    factors = run.abstract_trainable["lora"]["layers"][DEFAULT]
    scales = adapter_variables({DEFAULT: Adapter(factors, dict.fromkeys(factors, lora.scale))})["lora_scale"]
    params = load_with_progress(run.source, run.config.train.dtype, run.mesh, console)
    base = quantise(run.model.config, params, run.mesh) if lora.quantise else {"params": params}
    return {**base, "lora_scale": scales}


def _train_from(
    run: Run, state: TrainState, frozen: dict[str, Any], checkpoints: Checkpoints, watch: "_Watch"
) -> dict[str, Any]:
    start, steps = int(state.step), run.batches.steps
    schedule = learning_rate_schedule(run.config.train, steps)
    # simulated CPU devices deadlock when steps run ahead of each other; elsewhere one step is dispatched ahead
    ahead = 0 if jax.default_backend() == "cpu" else 1
    in_flight: deque[tuple[int, dict[str, jax.Array], dict[str, np.ndarray]]] = deque()
    with MetricsWriter(run.output, start) as metrics, _stop_signal() as stop:

        def finish_oldest() -> None:
            number, sums, batch = in_flight.popleft()
            host_sums = jax.device_get(sums)
            record = step_record(number, host_sums, batch, float(schedule(number - 1)), watch.lap())
            metrics.write(record)
            watch.show(record)

        saved_at = time.monotonic()
        for number, batch in enumerate(run.batches.iterate(start), start=start + 1):
            state, sums = run.train_step(state, frozen, to_devices(batch, run.mesh))
            in_flight.append((number, sums, batch))
            while len(in_flight) > ahead:
                finish_oldest()
            stopping = stop()
            if stopping or number == steps or _save_is_due(run.config, number, saved_at):
                while in_flight:
                    finish_oldest()
                checkpoints.save(state, run.identity)
                saved_at = time.monotonic()
            if stopping and number < steps:
                checkpoints.wait()
                raise StoppedEarly(f"stopped after step {number:,} of {steps:,}, saved; the same command resumes there")
        checkpoints.wait()
        summary = watch.summary() | {"steps": steps, "resumed_from": start or None}
    (run.output / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    return summary


def _save_is_due(config: RunConfig, step: int, saved_at: float) -> bool:
    every = config.checkpoint
    by_steps = every.every_steps is not None and step % every.every_steps == 0
    return by_steps or (every.every_minutes is not None and time.monotonic() - saved_at >= 60 * every.every_minutes)


@contextlib.contextmanager
def _stop_signal() -> Iterator[Any]:
    """Ctrl-C and SIGTERM ask for a stop at the next step; a second Ctrl-C interrupts at once."""
    received: list[int] = []

    def handle(number: int, _: Any) -> None:
        received.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class _Watch:
    """Progress for people: a live bar in a terminal, and a line now and then everywhere; keeps the timings."""

    def __init__(self, console: Console, start: int, steps: int, seconds_between_lines: float):
        self.steps, self.console, self.seconds_between_lines = steps, console, seconds_between_lines
        self.records: list[Record] = []
        self.started = self.last_lap = time.monotonic()
        self.last_line = 0.0
        columns = (
            TextColumn("train"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self.bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self.task = self.bar.add_task("train", total=steps, completed=start)

    def __enter__(self) -> "_Watch":
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def lap(self) -> float:
        """Seconds since the last step was finished."""
        now = time.monotonic()
        seconds, self.last_lap = now - self.last_lap, now
        return seconds

    def show(self, record: Record) -> None:
        self.records.append(record)
        self.bar.update(self.task, completed=record["step"])
        now = time.monotonic()
        if len(self.records) == 1 or record["step"] == self.steps or now - self.last_line > self.seconds_between_lines:
            self.last_line = now
            # the first step compiles: it says nothing about the others
            eta = self.step_seconds * (self.steps - record["step"]) if len(self.records) > 1 else None
            self.console.print(format_record(record, self.steps, eta), highlight=False, soft_wrap=True)

    @property
    def step_seconds(self) -> float:
        """The median of the recent steps, the first one (it compiles) left out where there are others."""
        recent = [record["seconds"] for record in self.records[1:][-50:]]
        return statistics.median(recent or [self.records[0]["seconds"]])

    def summary(self) -> dict[str, Any]:
        """Figures of this process's part of the run; tokens/s are over the median step."""
        if not self.records:
            return {"step_seconds": None, "loss": None}
        last = self.records[-1]
        rates = {
            f"{name}_per_second": last[name] / self.step_seconds
            for name in ("tokens", "useful_tokens", "labelled_tokens")
        }
        seconds = time.monotonic() - self.started
        self.console.print(f"done      in {format_seconds(seconds)}, loss {last['loss']:.4f}")
        return {"loss": last["loss"], "seconds": seconds, "step_seconds": self.step_seconds, **rates}
