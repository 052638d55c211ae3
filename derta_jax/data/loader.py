"""Batches as a pure function of (rows, seed, step): resuming is asking for the next step, on any number of hosts."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np

from derta_jax.config import Objective
from derta_jax.data.packing import Layout, draw_batches, lay_out
from derta_jax.data.recipes import example_rng
from derta_jax.data.tokenise import Region, TokenRow
from derta_jax.errors import UserError

Batch = dict[str, np.ndarray]
"""`token_ids`, `segment_ids`, `positions` int32, `regions` uint8, `rto` and `keep` bool; all [accumulation, S, T].

Segment 0 is padding. `keep` marks the tokens whose label counts: token t is predicted from what stands before it.
"""


def keep_labels(row: TokenRow, objective: Objective, seed: int, epoch: int, padded_length: int) -> np.ndarray:
    """Bool [n]: the row's labelled tokens, thinned out for RTO rows ("sorry dropout").

    `max(1, ceil(rate · n))` response positions stay, drawn from (seed, epoch, row id). With `objective.paper` the draw
    is over all `padded_length` positions of the padded row, as the authors' code does it, so that few or none of the
    labels may survive.
    """
    labelled = row.labelled
    if not row.rto or objective.sorry_keep_rate == 1.0:
        return labelled
    candidates = np.arange(padded_length) if objective.paper else np.flatnonzero(labelled)
    count = max(1, math.ceil(objective.sorry_keep_rate * len(candidates)))
    chosen = example_rng(seed, epoch, row.id).choice(candidates, count, replace=False)
    drawn = np.zeros(max(padded_length, len(row)), bool)
    drawn[chosen] = True
    return labelled & drawn[: len(row)]


class PlannedStep(NamedTuple):
    """`rows` int32 [n]: a step's rows, sequence by sequence; `starts` int32: where in them each sequence starts."""

    rows: np.ndarray
    starts: np.ndarray


@dataclasses.dataclass(frozen=True)
class Batches:
    """The batches of a run by step number, counted from 0; a grain random-access source.

    `sequences` is the static number of sequences a step, `label_capacity` the most labelled tokens that one
    device of one micro-batch holds at any step.
    """

    rows: Sequence[TokenRow]
    layout: Layout
    objective: Objective
    seed: int
    steps: int

    def __post_init__(self) -> None:
        if not self.rows:
            raise UserError("no row has a labelled token left: raise train.sequence_length")

    def __len__(self) -> int:
        return self.steps

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        return np.array([len(row) for row in self.rows])

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.rows) // self.layout.batch_size)

    @functools.cached_property
    def sequences(self) -> int:
        if not self.layout.packed:
            return self.layout.round_up(min(self.layout.batch_size, len(self.rows)))
        return self.layout.round_up(max(len(step.starts) for step in self._plan))

    @functools.cached_property
    def label_capacity(self) -> int:
        counts = self._most_labels
        hands = self.layout.accumulation * self.layout.shards
        most = 1
        for step in self._plan:
            labels = np.zeros(self.sequences, np.int64)
            labels[: len(step.starts)] = np.add.reduceat(counts[step.rows], step.starts)
            most = max(most, int(labels.reshape(-1, hands).sum(0).max()))
        return most

    def sequences_of_step(self, step: int) -> list[list[int]]:
        """Indices of the rows in each sequence."""
        rows, starts = self._plan[step]
        bounds = [*starts.tolist(), len(rows)]
        return [rows[start:end].tolist() for start, end in itertools.pairwise(bounds)]

    def row_ids(self, step: int) -> list[str]:
        return [self.rows[row].id for row in self._plan[step].rows]

    def __getitem__(self, step: int) -> Batch:
        if not 0 <= step < self.steps:
            raise IndexError(f"step {step} of {self.steps}")
        layout = self.layout
        shape = (self.sequences, layout.sequence_length)
        batch: Batch = {
            "token_ids": np.zeros(shape, np.int32),
            "segment_ids": np.zeros(shape, np.int32),
            "positions": np.zeros(shape, np.int32),
            "regions": np.zeros(shape, np.uint8),
            "rto": np.zeros(shape, bool),
            "keep": np.zeros(shape, bool),
        }
        epoch = step // self.steps_per_epoch
        sequences = self._padded_sequences(step)
        per_micro = self.sequences // layout.accumulation
        tokens = np.array([sum(self.lengths[sequence].tolist()) for sequence in sequences])
        padded_lengths = tokens.reshape(layout.accumulation, per_micro).max(1).tolist()
        for index, sequence in enumerate(sequences):
            padded_length = padded_lengths[index // per_micro]
            start = 0
            for segment, row_index in enumerate(sequence, start=1):
                row = self.rows[row_index]
                place = (index, slice(start, start + len(row)))
                batch["token_ids"][place] = row.token_ids
                batch["segment_ids"][place] = segment
                batch["positions"][place] = np.arange(len(row))
                batch["regions"][place] = row.regions
                batch["rto"][place] = row.rto
                batch["keep"][place] = keep_labels(row, self.objective, self.seed, epoch, padded_length)
                start += len(row)
        batch = {name: array.reshape(layout.accumulation, per_micro, -1) for name, array in batch.items()}
        self._check_labels(batch, step)
        return batch

    def iterate(self, start: int, prefetch: int = 4) -> Iterator[Batch]:
        """Batches from step `start` on, `prefetch` of them made ahead of time on background threads.

        The threads start now, and end with the iterator: when it is exhausted, closed or let go of.
        """
        _ = self._plan, self.sequences  # made once, before several threads ask for them
        source = grain.MapDataset.source(self)[start:]  # type: ignore[index]
        ahead = iter(source.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=prefetch)))
        ahead.start_prefetch()
        return _until_closed(ahead)

    def _check_labels(self, batch: Batch, step: int) -> None:
        """In `paper` mode the mean of a micro-batch without labels would be 0/0."""
        empty = ~batch["keep"].any(axis=(1, 2))
        if empty.all() or (self.objective.paper and empty.any()):
            raise UserError(
                f"step {step + 1}: a batch has no labelled token left (rows {', '.join(self.row_ids(step)[:8])}, …): "
                "raise objective.sorry_keep_rate, or lower train.accumulation"
            )

    def _padded_sequences(self, step: int) -> list[list[int]]:
        """The step's sequences and empty ones, dealt out like cards so that every device gets its share of both."""
        sequences = self.sequences_of_step(step)
        sequences = sequences + [[]] * (self.sequences - len(sequences))
        hands = self.layout.accumulation * self.layout.shards
        return [sequence for hand in range(hands) for sequence in sequences[hand::hands]]

    @functools.cached_property
    def _most_labels(self) -> np.ndarray:
        """The most labels that each row may keep, int64 [rows]."""
        answer = int(Region.RESPONSE)
        labels = np.array([np.count_nonzero(row.regions[1:] >= answer) for row in self.rows])
        if self.objective.paper:
            return labels
        thinned = np.maximum(1, np.ceil(self.objective.sorry_keep_rate * labels)).astype(np.int64)
        return np.where([row.rto for row in self.rows], thinned, labels)

    @functools.cached_property
    def _plan(self) -> list[PlannedStep]:
        plan = []
        for step in range(self.steps):
            epoch, index = divmod(step, self.steps_per_epoch)
            if index == 0:
                rng = np.random.default_rng([self.seed, epoch])
                batches = draw_batches(self.lengths, self.layout.batch_size, rng)
            sequences = lay_out(batches[index], self.lengths, self.layout)
            sizes = [0, *map(len, sequences[:-1])]
            rows = np.array([row for sequence in sequences for row in sequence], np.int32)
            plan.append(PlannedStep(rows, np.cumsum(sizes, dtype=np.int32)))
        return plan


def _until_closed(ahead: Any) -> Iterator[Batch]:
    try:
        yield from ahead
    finally:
        ahead.close()
