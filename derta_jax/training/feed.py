"""Batches that lie on the devices before the loop asks for them."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import jax
from jax.sharding import Mesh

from derta_jax.data.loader import Batch, Batches
from derta_jax.training.step import to_devices


def feed(batches: Batches, start: int, mesh: Mesh) -> Iterator[tuple[Batch, dict[str, jax.Array]]]:
    """Each batch from step `start` on, and its arrays on the devices; a thread brings the next one meanwhile."""
    made = batches.iterate(start)

    def bring() -> tuple[Batch, dict[str, jax.Array]]:
        batch = next(made)
        return batch, to_devices(batch, mesh)

    with ThreadPoolExecutor(1, thread_name_prefix="derta-feed") as thread:
        upcoming = thread.submit(bring)
        for step in range(start, batches.steps):
            brought = upcoming.result()
            if step + 1 < batches.steps:
                upcoming = thread.submit(bring)
            yield brought
