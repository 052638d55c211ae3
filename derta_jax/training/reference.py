"""What the model that training begins with says of each row, computed before the first step and kept with the run.

Only where all parameters are trained: beneath an adapter that model is still there. The file lies in `rows/` of the run
directory: a line with a digest of what it was made for and of the rest, then float32 numbers, one a token. What is not
whole, or was made for other rows, is made again, from `model.path`.
"""

import contextlib
import dataclasses
import functools
import hashlib
import os
import time
from collections.abc import Sequence

import jax
import numpy as np
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec
from rich.console import Console
from rich.progress import Progress

from derta_jax.data.loader import Batches
from derta_jax.data.tokenise import TokenRow
from derta_jax.errors import UserError
from derta_jax.interop.tensor_files import as_os_error
from derta_jax.objectives.objective import of_config
from derta_jax.objectives.view import Batch, View
from derta_jax.training.compiler import compiler_options
from derta_jax.training.feed import feed
from derta_jax.training.pod import processes
from derta_jax.training.progress import load_with_progress
from derta_jax.training.run import Run

MAGIC = b"derta reference 1 "
"""Counts up when the format changes."""


def with_reference(run: Run, resuming: bool, console: Console) -> Run:
    """The run with `reference_nll` in its batches, read where a run that is resumed has left it.

    All processes call this. Raises `UserError` where the run directory cannot be written.
    """
    looked_at = {"train": run.batches} | ({"held-out": run.held_out.batches} if run.held_out else {})
    files = {name: run.output / "rows" / f"reference-{name}.nll" for name in looked_at}
    found: dict[str, list[np.ndarray] | None] = dict.fromkeys(looked_at)
    if resuming:
        found = {name: _read(files[name], batches.rows, _key(run, batches)) for name, batches in looked_at.items()}
    if not all(processes.gather("the reference", all(found[name] is not None for name in looked_at))):
        found = dict(_compute(run, looked_at, console))
        for name, batches in looked_at.items():
            write = functools.partial(_write, files[name], found[name] or [], _key(run, batches))
            processes.first_does(f"write the reference of {name} rows", write)
    if run.held_out:
        run.held_out.batches = dataclasses.replace(run.held_out.batches, reference=found["held-out"])
    return dataclasses.replace(run, batches=dataclasses.replace(run.batches, reference=found["train"]))


def _compute(run: Run, looked_at: dict[str, Batches], console: Console) -> dict[str, list[np.ndarray]]:
    """-log P of each labelled token of each row, 0 of the others."""
    started = time.monotonic()
    params = load_with_progress(run.source, run.config.train.dtype, run.mesh, console)
    model = run.program.model.clone(remat="none")
    objective = of_config(run.config).in_full()
    made: dict[str, list[np.ndarray]] = {}
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar, jax.set_mesh(run.mesh):
        for name, batches in looked_at.items():
            layout = dataclasses.replace(batches.layout, accumulation=1, tree=False)
            once = Batches(batches.rows, layout, objective, run.config.train.seed, 1)
            once = dataclasses.replace(once, steps=once.steps_per_epoch)

            def nll(params: object, batch: Batch, once: Batches = once) -> jax.Array:
                view = View(model, {"params": params}, run.refusal_id, once.label_capacity, objective.loss_chunk)
                micro = {name: array[0] for name, array in batch.items()}
                return view.nll(view.forward(micro), micro["token_ids"], micro["keep"])

            everywhere = NamedSharding(run.mesh, PartitionSpec())
            options = compiler_options(run.mesh)
            compiled = jax.jit(nll, out_shardings=everywhere, compiler_options=options)
            by_row: dict[int, np.ndarray] = {}
            for step, (_, batch) in enumerate(bar.track(feed(once, 0, run.mesh), once.steps, description="reference")):
                values = jax.device_get(compiled(params, batch))
                for sequence, line in zip(once.placed_sequences(step), values, strict=True):
                    ends = np.cumsum([len(once.rows[row]) for row in sequence])
                    by_row |= zip(sequence, np.split(line, ends)[:-1], strict=True)
            made[name] = [by_row[row] for row in range(len(batches.rows))]
    jax.tree.map(lambda leaf: leaf.delete(), params)
    console.print(
        f"reference of {', '.join(f'{len(each.rows):,} {name}' for name, each in looked_at.items())} rows in "
        f"{time.monotonic() - started:.1f} s",
        highlight=False,
    )
    return made


def _key(run: Run, batches: Batches) -> bytes:
    """Of the model, by its name, and of every token."""
    digest = hashlib.sha256(repr((run.source.path, run.source.step, run.config.train.dtype)).encode())
    for row in batches.rows:
        digest.update(np.int32(len(row)).tobytes() + row.token_ids.tobytes() + row.labelled.tobytes())
    return digest.digest()


def _first_line(key: bytes, content: bytes) -> bytes:
    return MAGIC + hashlib.sha256(key + content).hexdigest().encode() + b"\n"


def _write(file: epath.Path, reference: Sequence[np.ndarray], key: bytes) -> None:
    content = np.concatenate(reference).astype(np.float32).tobytes()
    partial = file.with_name(f"{file.name}.{os.getpid()}.partial")
    try:
        with as_os_error():
            file.parent.mkdir(parents=True, exist_ok=True)
            partial.write_bytes(_first_line(key, content) + content)
            partial.replace(file)
    except OSError as error:
        raise UserError(f"cannot write {file} ({error}): give train.output a place with room to write") from error


def _read(file: epath.Path, rows: Sequence[TokenRow], key: bytes) -> list[np.ndarray] | None:
    """What `_write` wrote with the same key, None where there is none, or not all of it."""
    with contextlib.suppress(OSError), as_os_error():
        line, _, content = file.read_bytes().partition(b"\n")
        if line + b"\n" == _first_line(key, content):
            ends = np.cumsum([len(row) for row in rows])
            return np.split(np.frombuffer(content, np.float32), ends)[:-1]
    return None
