"""Which rows make up each step, and where each lies: a plan computed from (seed, epoch, lengths) alone."""

import bisect
import dataclasses
from collections.abc import Sequence

import numpy as np

from derta_jax.models.attention import LANES


def draw_batches(lengths: np.ndarray, batch_size: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Split all rows over `ceil(n / batch_size)` batches at random, stratified by length.

    Rows are sorted by length, ties in random order; each run of neighbours gives one row to every batch. Batches then
    hold almost equally many tokens, so that packed batches have one static shape and little padding, and sizes differ
    by at most one row.
    """
    count = -(-len(lengths) // batch_size)
    shuffled = rng.permutation(len(lengths))
    by_length = shuffled[np.argsort(-lengths[shuffled], kind="stable")]
    owners = np.concatenate([rng.permutation(count) for _ in range(0, len(lengths), count)])[: len(lengths)]
    batches = [by_length[owners == batch] for batch in range(count)]
    rng.shuffle(batches)  # type: ignore[arg-type]
    return batches


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing: indices of `lengths` grouped into sequences of at most `capacity` tokens."""
    sequences: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, sequence), sorted
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[index]
        slot = bisect.bisect_left(room, (length, -1))
        if slot == len(room):
            left, sequence = capacity, len(sequences)
            sequences.append([])
        else:
            left, sequence = room.pop(slot)
        sequences[sequence].append(index)
        bisect.insort(room, (left - length, sequence))
    return sequences


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a step's sequences are cut: `accumulation` micro-batches, each over `shards` devices."""

    batch_size: int
    sequence_length: int
    accumulation: int = 1
    shards: int = 1
    packed: bool = True
    tree: bool = False

    def round_up(self, sequences: int) -> int:
        """The fewest sequences that split evenly over micro-batches and devices."""
        multiple = self.accumulation * self.shards
        return -(-sequences // multiple) * multiple


def lay_out(rows: np.ndarray, lengths: np.ndarray, layout: Layout) -> list[list[int]]:
    """The sequences of one step, each a list of rows: packed, or one row each."""
    if not layout.packed:
        return [[int(row)] for row in rows]
    return [[int(rows[i]) for i in sequence] for sequence in pack(lengths[rows].tolist(), layout.sequence_length)]


def lay_out_steps(steps: Sequence[np.ndarray], layout: Layout) -> tuple[int, list[list[list[int]]]]:
    """How long sequences are, and what lies in those of each step, for one step or more of rows `steps[step]` [n] long.

    Shapes are static, so the step that needs most sequences decides. Of `layout.sequence_length` and the multiples of
    `LANES` below it that hold the longest row, the length with the fewest places is taken: short rows do not pay for
    long sequences.
    """
    longest, most = max(map(np.max, steps)), max(map(np.sum, steps))
    best = _laid_out(steps, layout)
    fewest = _places(best, layout)
    for length in range(layout.sequence_length // LANES * LANES, longest - 1, -LANES):
        shorter = dataclasses.replace(layout, sequence_length=length)
        if shorter.round_up(-(-most // length)) * length < fewest:
            laid_out = _laid_out(steps, shorter)
            if (places := _places(laid_out, shorter)) < fewest:
                layout, best, fewest = shorter, laid_out, places
    return layout.sequence_length, best


def _laid_out(steps: Sequence[np.ndarray], layout: Layout) -> list[list[list[int]]]:
    return [lay_out(np.arange(len(lengths)), lengths, layout) for lengths in steps]


def _places(laid_out: list[list[list[int]]], layout: Layout) -> int:
    return layout.round_up(max(map(len, laid_out))) * layout.sequence_length
