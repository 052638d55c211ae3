"""How fast rows are read, tokenised, packed and made into batches, on this machine's cores."""

import importlib
import time
from collections.abc import Callable
from typing import Any, TypeVar

from rich import box
from rich.console import Console
from rich.table import Table

from derta_jax.benchmark.contest import machine, versions
from derta_jax.config import RunConfig
from derta_jax.data.dataset import load_dataset
from derta_jax.data.loader import Batches
from derta_jax.data.packing import Layout
from derta_jax.data.pipeline import training_rows
from derta_jax.errors import UserError
from derta_jax.interop.tokenizer import load_tokenizer
from derta_jax.objectives.objective import of_config
from derta_jax.training.restore import find_files

T = TypeVar("T")
MOST_STEPS = 200
"""Of which batches are made."""


def bench_data(config: RunConfig, console: Console) -> dict[str, Any]:
    """Seconds, rows/s and tokens/s of each stage, in turn; one epoch is planned, and up to 200 of its batches are made.

    A run does the first two once and keeps the rows; batches are made ahead, on other threads than the loop's. Raises
    `UserError` for data and models that cannot be read.
    """
    train, objective = config.train, of_config(config)
    seconds: dict[str, float] = {}

    def timed(stage: str, function: Callable[[], T]) -> T:
        started = time.perf_counter()
        with console.status(f"{stage} …"):
            result = function()
        seconds[stage] = time.perf_counter() - started
        return result

    tokenizer = load_tokenizer(find_files(config.model.path))
    importlib.import_module("tensorflow_datasets")  # which takes seconds, once
    dataset = timed("read", lambda: load_dataset(config.data.path))
    rows = timed("tokenise", lambda: training_rows(dataset, config, objective, tokenizer)).rows
    if not rows:
        raise UserError("no row has a labelled token left: raise train.sequence_length")
    packing = config.data.packing
    layout = Layout(
        train.batch_size, train.sequence_length, train.accumulation, packed=packing != "none", tree=packing == "tree"
    )
    steps = Batches(rows, layout, objective, train.seed, 1, objective.shares).steps_per_epoch
    batches = Batches(rows, layout, objective, train.seed, steps, objective.shares)
    sequences = timed("pack", lambda: batches.sequences)
    made = min(steps, MOST_STEPS)
    filled = timed("batches", lambda: sum(int((batches[step]["segment_ids"] > 0).sum()) for step in range(made)))
    in_batches = sum(len(batches.row_ids(step)) for step in range(made))
    tokens = int(batches.lengths.sum())
    amounts = {"read": (len(rows), tokens), "tokenise": (len(rows), tokens), "pack": (len(rows), tokens)}
    amounts["batches"] = in_batches, filled
    return {
        "machine": machine(),
        "versions": versions(),
        "rows": len(rows),
        "tokens": tokens,
        "fill": filled / (made * sequences * batches.length),
        "stages": {
            stage: {
                "seconds": seconds[stage],
                "rows_per_second": rows_done / seconds[stage],
                "tokens_per_second": tokens_done / seconds[stage],
            }
            for stage, (rows_done, tokens_done) in amounts.items()
        },
    }


def data_table(results: dict[str, Any]) -> Table:
    """For the terminal."""
    fill = f"{results['fill']:.1%} full"
    table = Table("stage", *("seconds", "rows/s", "tokens/s"), box=box.SIMPLE_HEAD, caption=f"sequences are {fill}")
    for stage, each in results["stages"].items():
        figures = each["rows_per_second"], each["tokens_per_second"]
        table.add_row(stage, f"{each['seconds']:.2f}", *(f"{figure:,.0f}" for figure in figures))
    return table
