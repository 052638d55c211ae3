"""The training loop: dispatch a step, watch it, save, look at held-out examples, and stop cleanly when asked to."""

import json
import os
import time
from collections import deque
from typing import Any

import jax
import numpy as np
from rich.console import Console

from derta_jax.config import RunConfig, dump_config
from derta_jax.errors import RunFailed, StoppedEarly
from derta_jax.interop.hf_export import copy_model_files
from derta_jax.models.lora import joined
from derta_jax.training.checkpoint import Checkpoints
from derta_jax.training.feed import feed
from derta_jax.training.held_out import format_held_out
from derta_jax.training.pod import processes
from derta_jax.training.pod.doctor import check_start
from derta_jax.training.reference import with_reference
from derta_jax.training.run import Run, describe, prepare_run
from derta_jax.training.start import first_state, frozen_variables
from derta_jax.training.step import GO_ON, SAVE, STOP, TrainState, cast_votes
from derta_jax.training.stopping import stop_requested
from derta_jax.training.watching.goodput import Ledger, format_goodput
from derta_jax.training.watching.metrics import Lap, MetricsWriter, step_record
from derta_jax.training.watching.profile import WARM_UP, Profile
from derta_jax.training.watching.watch import Meter, Watch


def train(
    config: RunConfig,
    console: Console,
    dry_run: bool = False,
    profile_steps: int = 0,
    started: float | None = None,
    seconds_between_lines: float = 2.0,
) -> dict[str, Any]:
    """Train, resuming where the output directory left off; returns the summary that is also written there.

    All processes of a pod call this together. `profile_steps` are traced for XProf; `started` is the Unix time from
    which on the run's time counts (default: now). Raises `UserError` for bad input, before anything is compiled,
    `StoppedEarly` after Ctrl-C or SIGTERM, saved, and `RunFailed` when too many steps in a row are not finite.
    """
    ledger = Ledger(config.train.output, started)
    check_start(config, console)
    _keep_compiled_programs(config.train.compilation_cache)
    run = prepare_run(config, console, keep_rows=not dry_run)
    console.print(describe(run), highlight=False, soft_wrap=True)
    if dry_run:
        return {}
    keep = config.checkpoint
    with ledger, Checkpoints(run.output / "checkpoints", keep.keep, keep.keep_best) as checkpoints:
        with ledger.spending("load"):
            if run.program.stores_reference:
                run = with_reference(run, checkpoints.latest_step is not None, console)
            state = first_state(run, checkpoints, console)
        summary = run.output / "summary.json"
        if int(state.step) == run.batches.steps and summary.exists():
            console.print("finished  there is nothing left to do")
            return json.loads(summary.read_text())
        processes.first_does("write the config", lambda: _write_config(run))
        with ledger.spending("load"):
            frozen = frozen_variables(run, console)
        meter = Meter.of(config, run.source.config, run.mesh)
        watching = Watch(console, int(state.step), run.batches.steps, seconds_between_lines, ledger, meter)
        with jax.set_mesh(run.mesh), watching as watch:
            return _train_from(run, state, frozen, checkpoints, watch, profile_steps)


def _keep_compiled_programs(directory: str | None) -> None:
    """Have JAX find on the next start what it compiles now, unless it has a place of its own for that."""
    if directory is not None and jax.config.values["jax_compilation_cache_dir"] is None:
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser(directory))


def _write_config(run: Run) -> None:
    (run.output / "config.yaml").write_text(dump_config(run.config))
    copy_model_files(run.source.files, run.output / "model")


def _train_from(
    run: Run,
    state: TrainState,
    frozen: dict[str, Any],
    checkpoints: Checkpoints,
    watch: Watch,
    profile_steps: int,
) -> dict[str, Any]:
    config, console, ledger = run.config, watch.console, watch.ledger
    start, steps = int(state.step), run.batches.steps
    with ledger.spending("compile"):
        step = run.compile_step(console)
    # the devices of a CPU deadlock when steps run ahead of each other; elsewhere one step is dispatched ahead
    ahead = 0 if jax.default_backend() == "cpu" and run.mesh.size > 1 else 1
    in_flight: deque[tuple[int, dict[str, jax.Array], dict[str, np.ndarray]]] = deque()
    settled: list[tuple[int, dict[str, Any], dict[str, np.ndarray], Lap]] = []
    ballots = [cast_votes(vote, run.mesh) for vote in (GO_ON, SAVE, STOP)]
    verdict = GO_ON
    streak = _Streak(run)
    saved_at = time.monotonic()
    writer = MetricsWriter(run.output, start, console, config.watch.wandb, config.model_dump(mode="json"))
    profile = Profile(run.output, start + 1 + WARM_UP, profile_steps, console)

    with writer as metrics, profile, stop_requested() as stop:
        ledger.begin(start, metrics.reached)

        def settle_oldest() -> None:
            """Wait for the oldest step in flight."""
            nonlocal verdict
            report_settled()
            number, sums, batch = in_flight.popleft()
            with ledger.spending("step"):
                host_sums = jax.device_get(sums)
            ledger.finished(number)
            verdict = max(verdict, int(host_sums["verdict"]))
            settled.append((number, host_sums, batch, watch.lap()))

        def report_settled() -> None:
            """Write and show the step that was waited for; the devices are busy with the next one by then."""
            while settled:
                record = watch.measured(step_record(*settled.pop(), run.source.config.sliding_window))
                metrics.write(record)
                watch.show(record)
                streak.add(record)

        def look_at_held_out(number: int) -> float | None:
            if run.held_out is None:
                return None
            with ledger.spending("held_out"):
                record = run.held_out.evaluate(joined(frozen, state.trainable))
            metrics.write_held_out({"step": number, **record})
            console.print(f"step {number:,}  {format_held_out(record)}", highlight=False, soft_wrap=True)
            return record["held_out_loss"]

        if start == 0:
            look_at_held_out(0)
        fed = feed(run.batches, start, run.mesh)
        for number in range(start + 1, steps + 1):
            with ledger.spending("input"):
                batch, on_devices = next(fed)
            vote = STOP if stop() else SAVE if _minutes_are_up(config, saved_at) else GO_ON
            with profile.step(number), ledger.spending("step"):
                state, sums = step(state, frozen, on_devices, ballots[vote])
            in_flight.append((number, sums, batch))
            report_settled()
            while len(in_flight) > ahead:
                settle_oldest()

            saving = verdict > GO_ON or number == steps or _is_due(config.checkpoint.every_steps, number)
            looking = number == steps or (config.held_out is not None and _is_due(config.held_out.every_steps, number))
            if saving or looking:
                while in_flight:
                    settle_oldest()
                report_settled()
            held_out_loss = None
            if looking or (saving and config.checkpoint.keep_best):
                held_out_loss = look_at_held_out(number)
            if saving:
                with ledger.spending("checkpoint"):
                    checkpoints.save(state, run.identity, held_out_loss)
                metrics.sync()
                saved_at = time.monotonic()
                if verdict == STOP and number < steps:
                    with ledger.spending("checkpoint"):
                        checkpoints.wait()
                    console.print(format_goodput(ledger.summary()), highlight=False, soft_wrap=True)
                    raise StoppedEarly(
                        f"stopped after step {number:,} of {steps:,}, saved; the same command resumes there"
                    )
                verdict = GO_ON
        with ledger.spending("checkpoint"):
            checkpoints.wait()
    goodput = ledger.summary()
    console.print(format_goodput(goodput), highlight=False, soft_wrap=True)
    summary = watch.summary() | {"steps": steps, "resumed_from": start or None, "goodput": goodput}
    text = json.dumps(summary, indent=2) + "\n"
    processes.first_does("write the summary", lambda: (run.output / "summary.json").write_text(text))
    return summary


def _is_due(every: int | None, step: int) -> bool:
    return every is not None and step % every == 0


def _minutes_are_up(config: RunConfig, saved_at: float) -> bool:
    """Whether it is time to save, by the clock of the first process alone: two clocks would save twice."""
    minutes = config.checkpoint.every_minutes
    return minutes is not None and processes.index() == 0 and time.monotonic() - saved_at >= 60 * minutes


class _Streak:
    """Steps in a row that were skipped because their loss or gradient was not finite; too many end the run."""

    def __init__(self, run: Run):
        self.run = run
        self.steps: list[int] = []

    def add(self, record: dict[str, Any]) -> None:
        if not record["skipped"]:
            self.steps.clear()
            return
        self.steps.append(record["step"])
        if len(self.steps) < self.run.config.train.skip_limit:
            return
        file = self.run.output / "non_finite.json"
        rows = {step: self.run.batches.row_ids(step - 1) for step in self.steps}
        processes.first_does("write non_finite.json", lambda: file.write_text(json.dumps(rows, indent=2) + "\n"))
        raise RunFailed(
            f"steps {self.steps[0]:,} to {self.steps[-1]:,} had no finite loss and gradient (train.skip_limit is "
            f"{len(self.steps)}); the ids of their rows are in {file}, and the weights are those before these steps. "
            "Look at the rows, or lower train.learning_rate"
        )
