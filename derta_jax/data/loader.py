"""Batches as a pure function of (rows, seed, step): resuming is asking for the next step, on any number of hosts."""

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np

from derta_jax.data.packing import Layout, draw_batches, lay_out_steps
from derta_jax.data.recipes import example_rng
from derta_jax.data.row_maker import RowMaker
from derta_jax.data.tokenise import TokenRow, units_of
from derta_jax.data.trees import grow
from derta_jax.errors import UserError
from derta_jax.models.attention import BRANCH, TRUNK

Batch = dict[str, np.ndarray]
"""`token_ids`, `segment_ids`, `positions` int32, `regions`, `stream` uint8, `keep` bool; all [accumulation, S, T].

Segment 0 is padding. `stream` is a row's place among the objective's `streams`. `keep` marks the tokens whose label
counts: token t is predicted from what stands before it. Objectives may ask for two more, float32: `weight`, which is
1 / how many tokens of its stream the step keeps, and `reference_nll`. Packed as trees there is `trunk` uint8 (`trees`).
"""


def keep_labels(row: TokenRow, objective: RowMaker, seed: int, epoch: int, padded_length: int) -> np.ndarray:
    """Bool [n]: the tokens of the row that count in an epoch; what is drawn hangs on (seed, epoch, row id) alone."""
    return objective.keep(row, functools.partial(example_rng, seed, epoch, row.id), padded_length)


BATCH_DTYPES: dict[str, Any] = {
    "token_ids": np.int32,
    "segment_ids": np.int32,
    "positions": np.int32,
    "regions": np.uint8,
    "stream": np.uint8,
    "keep": np.bool_,
}


def batch_dtypes(objective: RowMaker, with_reference: bool, tree: bool) -> dict[str, Any]:
    """Of the arrays that the batches of an objective have."""
    more = {"weight": objective.means_by_stream, "reference_nll": with_reference}
    dtypes = BATCH_DTYPES | {name: np.float32 for name, wanted in more.items() if wanted}
    return dtypes | ({"trunk": np.uint8} if tree else {})


class PlannedStep(NamedTuple):
    """`rows` int32 [n]: a step's rows, sequence by sequence; `starts` int32: where in them each sequence starts."""

    rows: np.ndarray
    starts: np.ndarray


class Plan(NamedTuple):
    """Of all steps; `length` is that of sequences, in tokens."""

    length: int
    steps: list[PlannedStep]


@dataclasses.dataclass(frozen=True)
class Pot:
    """Units of rows that steps draw from, `batch_size` at a time; each unit once before any comes again."""

    units: Sequence[Sequence[int]]
    batch_size: int

    @property
    def steps(self) -> int:
        """That one pass through it takes."""
        return -(-len(self.units) // self.batch_size)


@dataclasses.dataclass(frozen=True)
class Batches:
    """The batches of a run by step number, counted from 0; a grain random-access source.

    `sequences` is the static number of sequences a step, `length` that of their tokens, at most
    `layout.sequence_length`, `label_capacity` the most labelled tokens that one device of one micro-batch holds at any
    step. `shares` says how much of a step is of which stream; without, all rows are in one pot. `reference` are the
    rows' own `reference_nll`, [n] each.
    """

    rows: Sequence[TokenRow]
    layout: Layout
    objective: RowMaker
    seed: int
    steps: int
    shares: Mapping[str, float] | None = None
    reference: Sequence[np.ndarray] | None = None

    def __post_init__(self) -> None:
        if not self.rows:
            raise UserError("no row has a labelled token left: raise train.sequence_length")
        for stream in self.shares or ():
            if not any(row.stream == stream for row in self.rows):
                raise UserError(f"no row is of the stream {stream!r}, which objective {self.objective.name} draws from")

    def __len__(self) -> int:
        return self.steps

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """How many tokens of each row are placed: all of them, but for what a tree's trunk holds."""
        return np.array([len(row) for row in self.rows]) - self.trunks

    @property
    def trunks(self) -> np.ndarray:
        """How many tokens each row leaves to the row before it, int32 [rows]."""
        return self._grown[1]

    @functools.cached_property
    def _grown(self) -> tuple[Sequence[Sequence[int]], np.ndarray]:
        if self.layout.tree:
            return grow(self.rows, self.layout.sequence_length)
        return units_of(self.rows), np.zeros(len(self.rows), np.int32)

    @functools.cached_property
    def pots(self) -> list[Pot]:
        """One for each of the `shares`, or one for all rows. A step takes as many rows as without trees, on average."""
        units = self._grown[0]
        size = self.layout.batch_size
        if self.layout.tree:
            size = max(1, round(size * len(units) / len(units_of(self.rows))))
        if self.shares is None:
            return [Pot(units, size)]
        by_stream = {name: [unit for unit in units if self.rows[unit[0]].stream == name] for name in self.shares}
        return [Pot(by_stream[name], max(1, round(share * size))) for name, share in self.shares.items()]

    @property
    def steps_per_epoch(self) -> int:
        """Until each row has been seen: the steps of the pot that lasts longest."""
        return max(pot.steps for pot in self.pots)

    @functools.cached_property
    def sequences(self) -> int:
        if not self.layout.packed:
            return self.layout.round_up(sum(min(pot.batch_size, len(pot.units)) for pot in self.pots))
        return self.layout.round_up(max(len(step.starts) for step in self._plan.steps))

    @property
    def length(self) -> int:
        return self._plan.length

    @functools.cached_property
    def label_capacity(self) -> int:
        counts = self._most_labels
        hands = self.layout.accumulation * self.layout.shards
        most = 1
        for step in self._plan.steps:
            labels = np.zeros(self.sequences, np.int64)
            labels[: len(step.starts)] = np.add.reduceat(counts[step.rows], step.starts)
            most = max(most, int(labels.reshape(-1, hands).sum(0).max()))
        return most

    def sequences_of_step(self, step: int) -> list[list[int]]:
        """Indices of the rows in each sequence."""
        rows, starts = self._plan.steps[step]
        bounds = [*starts.tolist(), len(rows)]
        return [rows[start:end].tolist() for start, end in itertools.pairwise(bounds)]

    def row_ids(self, step: int) -> list[str]:
        return [self.rows[row].id for row in self._plan.steps[step].rows]

    def __getitem__(self, step: int) -> Batch:
        if not 0 <= step < self.steps:
            raise IndexError(f"step {step} of {self.steps}")
        layout = self.layout
        shape = (self.sequences, self.length)
        dtypes = batch_dtypes(self.objective, self.reference is not None, self.layout.tree)
        batch: Batch = {name: np.zeros(shape, dtype) for name, dtype in dtypes.items()}
        epochs = self._epochs(step)
        sequences = self.placed_sequences(step)
        per_micro = self.sequences // layout.accumulation
        tokens = np.array([sum(self.lengths[sequence].tolist()) for sequence in sequences])
        padded_lengths = tokens.reshape(layout.accumulation, per_micro).max(1).tolist()
        for index, sequence in enumerate(sequences):
            padded_length = padded_lengths[index // per_micro]
            start = before = 0
            for segment, row_index in enumerate(sequence, start=1):
                row, trunk = self.rows[row_index], int(self.trunks[row_index])
                place = (index, slice(start, start + len(row) - trunk))
                batch["token_ids"][place] = row.token_ids[trunk:]
                batch["segment_ids"][place] = segment
                batch["positions"][place] = np.arange(trunk, len(row))
                batch["regions"][place] = row.regions[trunk:]
                batch["stream"][place] = self.objective.streams.index(row.stream)
                kept = keep_labels(row, self.objective, self.seed, epochs[row.stream], padded_length)
                batch["keep"][place] = kept[trunk:]
                if self.reference is not None:
                    batch["reference_nll"][place] = self.reference[row_index][trunk:]
                if trunk:
                    if kept[:trunk].any():
                        raise UserError(f"objective {self.objective.name} counts tokens that trees share: {row.id}")
                    batch["trunk"][index, before : before + trunk] = TRUNK
                    batch["trunk"][place] = BRANCH
                before, start = start, start + len(row) - trunk
        if "weight" in batch:
            kept = np.bincount(batch["stream"][batch["keep"]], minlength=len(self.objective.streams))
            batch["weight"] = (batch["keep"] / np.maximum(kept, 1)[batch["stream"]]).astype(np.float32)
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
        """In a mean of means that of a micro-batch without labels would be 0/0."""
        empty = ~batch["keep"].any(axis=(1, 2))
        if empty.all() or (self.objective.mean_of_means and empty.any()):
            raise UserError(
                f"step {step + 1}: a batch has no labelled token left (rows {', '.join(self.row_ids(step)[:8])}, …): "
                "raise objective.sorry_keep_rate, or lower train.accumulation"
            )

    def placed_sequences(self, step: int) -> list[list[int]]:
        """The rows of each sequence of the batch, dealt out like cards: every device gets its share of empty ones."""
        sequences = self.sequences_of_step(step)
        sequences = sequences + [[]] * (self.sequences - len(sequences))
        hands = self.layout.accumulation * self.layout.shards
        return [sequence for hand in range(hands) for sequence in sequences[hand::hands]]

    def _epochs(self, step: int) -> dict[str, int]:
        """How often the rows of each stream have all been seen."""
        if self.shares is None:
            return dict.fromkeys(self.objective.streams, step // self.steps_per_epoch)
        return {name: step // pot.steps for name, pot in zip(self.shares, self.pots, strict=True)}

    @functools.cached_property
    def _most_labels(self) -> np.ndarray:
        """The most labels that each row may keep, int64 [rows]."""
        return np.array([self.objective.most_labels(row) for row in self.rows], np.int64)

    @functools.cached_property
    def _plan(self) -> Plan:
        drawn = [_draws(pot, self.lengths, self.steps, self.seed, number) for number, pot in enumerate(self.pots)]
        units = [list(itertools.chain(*some)) for some in zip(*drawn, strict=True)]
        sizes = [np.array([self.lengths[[*unit]].sum() for unit in together]) for together in units]
        length, laid_out = lay_out_steps(sizes, self.layout)
        plan = []
        for together, sequences in zip(units, laid_out, strict=True):
            rows = [[row for unit in sequence for row in together[unit]] for sequence in sequences]
            starts = np.cumsum([0, *map(len, rows[:-1])], dtype=np.int32)
            plan.append(PlannedStep(np.array(list(itertools.chain(*rows)), np.int32), starts))
        return Plan(length, plan)


def _draws(pot: Pot, lengths: np.ndarray, steps: int, seed: int, number: int) -> Iterator[list[Sequence[int]]]:
    """What each step draws from the pot of that number, stratified by length."""
    sizes = np.array([lengths[[*unit]].sum() for unit in pot.units])
    for step in range(steps):
        epoch, index = divmod(step, pot.steps)
        if index == 0:
            rng = np.random.default_rng([seed, epoch, number] if number else [seed, epoch])
            batches = draw_batches(sizes, pot.batch_size, rng)
        yield [pot.units[unit] for unit in batches[index]]


def _until_closed(ahead: Any) -> Iterator[Batch]:
    try:
        yield from ahead
    finally:
        ahead.close()
