"""Batches as a pure function of (rows, seed, step): resuming is asking for the next step, on any number of hosts."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence

import grain
import numpy as np

from derta_jax.config import Objective
from derta_jax.data.packing import Layout, draw_batches, lay_out
from derta_jax.data.recipes import example_rng
from derta_jax.data.tokenise import TokenRow
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


@dataclasses.dataclass(frozen=True)
class Batches:
    """The batches of a run by step number, counted from 0; a grain random-access source.

    `sequences` is the static number of sequences a step, `label_capacity` the most labelled tokens that one data
    group of one micro-batch holds at any step.
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
        return self.layout.round_up(max(len(self.sequences_of_step(step)) for step in range(self.steps)))

    @functools.cached_property
    def label_capacity(self) -> int:
        counts = np.array([self._most_labels(row) for row in self.rows])
        size = self.sequences // self.layout.accumulation // self.layout.groups
        most = 1
        for step in range(self.steps):
            labels = [int(counts[sequence].sum()) for sequence in self._padded_sequences(step)]
            most = max(most, *(sum(labels[start : start + size]) for start in range(0, len(labels), size)))
        return most

    def sequences_of_step(self, step: int) -> list[list[int]]:
        """Indices of the rows in each sequence."""
        epoch, index = divmod(step, self.steps_per_epoch)
        return lay_out(self._batches_of_epoch(epoch)[index], self.lengths, self.layout)

    def row_ids(self, step: int) -> list[str]:
        return [self.rows[row].id for sequence in self.sequences_of_step(step) for row in sequence]

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
        for index, sequence in enumerate(sequences):
            micro = sequences[index // per_micro * per_micro :][:per_micro]
            padded_length = max(int(self.lengths[rows].sum()) for rows in micro if rows) if sequence else 0
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
        """Batches from step `start` on, made ahead of time on background threads."""
        source = grain.MapDataset.source(self)[start:]  # type: ignore[index]
        return iter(source.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=prefetch)))

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

    def _most_labels(self, row: TokenRow) -> int:
        labels = int(row.labelled.sum())
        thinned = row.rto and not self.objective.paper
        return max(1, math.ceil(self.objective.sorry_keep_rate * labels)) if thinned else labels

    @functools.cached_property
    def _batches_of_epoch(self) -> Callable[[int], list[np.ndarray]]:
        def draw(epoch: int) -> list[np.ndarray]:
            return draw_batches(self.lengths, self.layout.batch_size, np.random.default_rng([self.seed, epoch]))

        return functools.lru_cache(maxsize=2)(draw)
