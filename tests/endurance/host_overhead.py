"""How much of a training loop's time is the jitted step? For a tiny model, where everything else weighs most.

    python -m tests.endurance.host_overhead --steps 300

Three figures. The share of the loop's wall time in which the device is at work on a step, at least: it may have been
idle only before a step that was dispatched after the one before had ended, and at most since the dispatch of that. Of
the loop's wall time, the share in which it dispatches a step or waits for one, by the run's own ledger: what is left is
batches, metrics, TensorBoard and the terminal's lines, most of it while the device works on the next step. And the time
of a step in the loop against that of the same compiled step run bare: one batch, no reading of results, with which the
host's threads have no core to share. Blocks of both alternate.

The device is one thread of the CPU, so that steps are dispatched ahead of their results and the host has a core of its
own, as beside an accelerator; on several simulated CPU devices each step has to be waited for.
"""

import argparse
import io
import os
import statistics
import tempfile
import time
from pathlib import Path

import jax
from rich.console import Console

from derta_jax.training.checkpoint import Checkpoints
from derta_jax.training.loop import train
from derta_jax.training.run import Run, prepare_run
from derta_jax.training.start import first_state, frozen_variables
from derta_jax.training.step import GO_ON, cast_votes, to_devices
from tests.conftest import write_example_rows, write_tiny_model
from tests.training.conftest import make_run_config

os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"


def main() -> None:
    """Print seconds a step, bare and in the loop, and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300, help="in a block")
    parser.add_argument("--blocks", type=int, default=3, help="of each kind")
    args = parser.parse_args()
    bare, loop, shares, busy = [], [], [], []
    Run.compile_step = _noting_dispatches(Run.compile_step)  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        model, rows = write_tiny_model(place / "model"), write_example_rows(place / "rows.jsonl")
        console = Console(file=io.StringIO())
        for block in range(args.blocks):
            config = make_run_config(
                model,
                rows,
                place / f"run-{block}",
                train={"steps": args.steps, "sequence_length": 96},
                checkpoint={"every_steps": None, "every_minutes": None},
            )
            run = prepare_run(config, console)
            bare.append(seconds_of_bare_steps(run, place / f"bare-{block}", args.steps, console))
            DISPATCHES.clear()
            summary = train(config, console)
            busy.append(share_at_work())
            loop.append(summary["step_seconds"])
            spent = summary["goodput"]["seconds"]
            shares.append(spent["step"] / (spent["step"] + spent["input"] + spent["other"]))
            print(
                f"block {block + 1}: bare {bare[-1] * 1e3:.2f} ms a step, loop {loop[-1] * 1e3:.2f} ms, "
                f"device at work {busy[-1]:.1%}, {shares[-1]:.1%} of the loop's time in the step by its ledger",
                flush=True,
            )
    ratios = [alone / within for alone, within in zip(bare, loop, strict=True)]
    for name, figures in (("device at work", busy), ("in the step, by the ledger", shares)):
        print(f"{name}: {statistics.median(figures):.1%} of the loop's time ({min(figures):.1%} to {max(figures):.1%})")
    print(f"bare / loop: {statistics.median(ratios):.1%} ({min(ratios):.1%} to {max(ratios):.1%})")


DISPATCHES: list[tuple[float, bool]] = []
"""Of each step of a loop: when it was dispatched, and whether the one before had ended by then."""


def share_at_work() -> float:
    """Of the time between the first dispatch and the last, that in which a step ran, at least."""
    times = [time for time, _ in DISPATCHES]
    idle = sum(time - before for before, (time, had_ended) in zip(times, DISPATCHES[1:], strict=False) if had_ended)
    return 1 - idle / (times[-1] - times[0])


def _noting_dispatches(compile_step):
    def compile_and_watch(*args):
        step = compile_step(*args)

        def watched(state, *rest):
            DISPATCHES.append((time.perf_counter(), state.step.is_ready()))
            return step(state, *rest)

        return watched

    return compile_and_watch


def seconds_of_bare_steps(run: Run, directory: Path, steps: int, console: Console) -> float:
    """Of one step after another, nothing else done."""
    with Checkpoints(directory) as checkpoints, jax.set_mesh(run.mesh):
        state, frozen = first_state(run, checkpoints, console), frozen_variables(run, console)
        step, batch = run.compile_step(console), to_devices(run.batches[0], run.mesh)
        votes = cast_votes(GO_ON, run.mesh)
        state, sums = step(state, frozen, batch, votes)
        jax.block_until_ready(sums)
        started = time.perf_counter()
        for _ in range(steps):
            state, sums = step(state, frozen, batch, votes)
        jax.block_until_ready((state, sums))
        return (time.perf_counter() - started) / steps


if __name__ == "__main__":
    main()
