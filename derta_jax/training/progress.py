"""Progress bars of bytes, and what loading a model took."""

import contextlib
import resource
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.sharding import Mesh
from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from derta_jax.training.restore import ModelSource, load_model


@contextlib.contextmanager
def byte_bar(console: Console, verb: str) -> Iterator[Callable[[int, int], None]]:
    """A bar of bytes in a terminal; yields a function that is told bytes done and bytes in all."""
    columns = (TextColumn(verb), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(verb, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def load_with_progress(source: ModelSource, dtype: str, mesh: Mesh, console: Console) -> Any:
    """`load_model` with a bar of the bytes that this process reads; prints size, time and peak memory."""
    started = time.monotonic()
    with byte_bar(console, "load") as progress:
        params = load_model(source, dtype, mesh, progress)
    jax.block_until_ready(params)
    seconds = time.monotonic() - started
    size, rate = decimal(held_bytes(params)), decimal(round(held_bytes(params) / seconds))
    console.print(
        f"loaded    {size} in {seconds:.1f} s ({rate}/s) as {dtype}, {peak_memory()}",
        highlight=False,
        soft_wrap=True,
    )
    return params


def held_bytes(tree: Any) -> int:
    """Bytes of the arrays that lie on this process's devices."""
    return sum(shard.data.nbytes for leaf in jax.tree.leaves(tree) for shard in leaf.addressable_shards)


def peak_memory() -> str:
    """The largest memory that this process, and the fullest of its devices, has taken so far."""
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    text = f"peak memory {decimal(host)}"
    devices = [stats["peak_bytes_in_use"] for device in jax.local_devices() if (stats := device.memory_stats())]
    return text + (f", {decimal(max(devices))} on a device" if devices else "")
