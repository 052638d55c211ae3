"""What does saving cost the step loop? Training with a checkpoint every ten steps against training without.

    python -m tests.endurance.saving_cost               # about ten minutes on two quiet cores
    python -m tests.endurance.saving_cost --steps 20

A random model of 43M parameters, whose float32 state (parameters and both moments of Adam) is 517 MB, is trained by the
step of `derta train` and saved by its `Checkpoints`. Blocks of ten steps with and without saving alternate, so that
whatever else the machine does falls on both. A block with saving begins with a save and ends when that is whole: it
holds the copy, the slower steps while orbax writes and the files are hashed, the manifest, and the deletion of an older
one. Warm-up steps and a first save come before.
"""

import argparse
import io
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from derta_jax.training.checkpoint import Checkpoints
from derta_jax.training.run import prepare_run
from derta_jax.training.start import first_state, frozen_variables
from derta_jax.training.step import GO_ON, cast_votes, to_devices
from tests.conftest import helpful, triple, write_jsonl, write_tiny_model
from tests.training.conftest import make_run_config

os.environ["XLA_FLAGS"] = ""  # the tests' eight devices and quick compiles

INTERVAL = 10
SIZES: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "head_dim": 64,
    "initializer_range": 0.02,
    "max_position_embeddings": 1024,
}


def main() -> None:
    """Print seconds of a block with and without saving, and the cost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100, help=f"of each kind, a multiple of {INTERVAL}")
    parser.add_argument("--tokens", type=int, default=768, help="in a step: one sequence")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        run = prepare_run(_config(Path(directory), args.tokens), Console(file=io.StringIO()))
        with Checkpoints(run.output / "checkpoints") as checkpoints, jax.set_mesh(run.mesh):
            _measure(run, checkpoints, args.steps // INTERVAL)


def _config(place: Path, tokens: int) -> Any:
    rows = [triple(i, harmful="Take one thing, " + "then another thing, " * 100) for i in range(32)]
    rows += [helpful(i, response="Take paper, " + "then a stick, " * 100) for i in range(32)]
    train = {"steps": 100_000, "batch_size": 1, "sequence_length": tokens}
    return make_run_config(
        write_tiny_model(place / "model", **SIZES),
        write_jsonl(place / "rows.jsonl", rows),
        place / "run",
        train=train,
    )


def _measure(run: Any, checkpoints: Checkpoints, blocks: int) -> None:
    console = Console(file=io.StringIO())
    state, frozen = first_state(run, checkpoints, console), frozen_variables(run, console)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    votes, batch = cast_votes(GO_ON, run.mesh), to_devices(run.batches[0], run.mesh)
    step = run.compile_step(console)
    print(f"state {size / 1e6:,.0f} MB, a step of {batch['token_ids'].size:,} tokens", flush=True)

    def block(save: bool) -> tuple[float, float]:
        nonlocal state
        started = time.perf_counter()
        if save:
            checkpoints.save(state, run.identity)
        blocked = time.perf_counter() - started
        for _ in range(INTERVAL):
            state, sums = step(state, frozen, batch, votes)
            jax.block_until_ready(sums)
        checkpoints.wait()
        return time.perf_counter() - started, blocked

    block(save=True)
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for number in range(2 * blocks):
        save = number % 4 in (1, 2)  # off, on, on, off: neither kind is always the later one
        taken, blocked = block(save)
        seconds[save].append(taken)
        print(f"{'saving' if save else 'off':8s} {taken:7.2f} s, {blocked:.2f} s of them in save()", flush=True)
    for name, of in (("totals", sum), ("medians", statistics.median)):
        off, on = of(seconds[False]), of(seconds[True])
        print(f"{name}: {off:.2f} s without saving, {on:.2f} s with: saving costs {on / off - 1:+.2%}")


if __name__ == "__main__":
    main()
