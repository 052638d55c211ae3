"""Which rows make up each step, and how they lie in sequences."""

import numpy as np
import pytest

from derta_jax.data.packing import Layout, draw_batches, lay_out, lay_out_steps, pack


def realistic_lengths(count: int = 2000, longest: int = 1024) -> np.ndarray:
    lengths = np.random.default_rng(0).lognormal(np.log(250), 0.6, count)
    return np.clip(lengths, 8, longest).astype(int)


def batches_of(lengths: np.ndarray, batch_size: int, seed: int = 0) -> list[np.ndarray]:
    return draw_batches(lengths, batch_size, np.random.default_rng(seed))


SIZES = [(1, 1), (1, 8), (7, 8), (8, 8), (9, 8), (100, 8), (2000, 128)]


@pytest.mark.parametrize(("rows", "batch_size"), SIZES)
def test_batches_hold_every_row_exactly_once(rows, batch_size):
    batches = batches_of(realistic_lengths(rows), batch_size)
    assert sorted(np.concatenate(batches)) == list(range(rows))


@pytest.mark.parametrize(("rows", "batch_size"), SIZES)
def test_there_are_as_few_batches_as_can_be_and_none_is_too_large(rows, batch_size):
    batches = batches_of(realistic_lengths(rows), batch_size)
    assert len(batches) == -(-rows // batch_size)
    assert max(map(len, batches)) <= batch_size


@pytest.mark.parametrize(("rows", "batch_size"), SIZES)
def test_batch_sizes_differ_by_at_most_one_row(rows, batch_size):
    sizes = {len(batch) for batch in batches_of(realistic_lengths(rows), batch_size)}
    assert max(sizes) - min(sizes) <= 1


def test_batches_hold_almost_equally_many_tokens():
    lengths = realistic_lengths()
    totals = [lengths[batch].sum() for batch in batches_of(lengths, 128)]
    assert max(totals) / min(totals) < 1.02


def test_batches_are_the_same_for_the_same_seed_and_other_ones_for_another():
    lengths = realistic_lengths(100)
    one, again, other = (batches_of(lengths, 8, seed) for seed in (1, 1, 2))
    assert [batch.tolist() for batch in one] == [batch.tolist() for batch in again]
    assert [batch.tolist() for batch in one] != [batch.tolist() for batch in other]


def test_rows_of_one_length_are_mixed_at_random():
    [first, *_] = batches_of(np.full(1000, 10), 100)
    assert sorted(first) != list(range(100))
    assert first.min() < 100 < 900 < first.max()


def test_packed_sequences_never_exceed_their_capacity():
    lengths = realistic_lengths(500).tolist()
    assert all(sum(lengths[row] for row in sequence) <= 1024 for sequence in pack(lengths, 1024))


def test_packing_loses_no_row_and_doubles_none():
    packed = pack(realistic_lengths(500).tolist(), 1024)
    assert sorted(row for sequence in packed for row in sequence) == list(range(500))


def test_packing_is_deterministic():
    lengths = realistic_lengths(500).tolist()
    assert pack(lengths, 1024) == pack(lengths, 1024)


def test_rows_that_fill_a_sequence_have_it_to_themselves():
    assert sorted(pack([10, 10, 10], 10)) == [[0], [1], [2]]


def test_short_rows_go_where_the_least_room_is_left():
    assert pack([7, 6, 3, 4], 10) == [[0, 2], [1, 3]]


def test_nothing_packs_into_nothing():
    assert pack([], 10) == []


def test_batches_of_realistic_rows_are_packed_almost_full():
    lengths = realistic_lengths()
    batches = batches_of(lengths, 128)
    sequences = sum(len(pack(lengths[batch].tolist(), 1024)) for batch in batches)
    assert lengths.sum() / (sequences * 1024) >= 0.97


def test_without_packing_each_row_is_a_sequence_of_its_own():
    rows = np.array([4, 2, 9])
    assert lay_out(rows, np.full(10, 3), Layout(8, 16, packed=False)) == [[4], [2], [9]]


def test_with_packing_sequences_hold_the_batchs_rows():
    lengths = realistic_lengths(100)
    rows = np.array([4, 2, 9, 50, 60])
    sequences = lay_out(rows, lengths, Layout(8, 1024))
    assert sorted(row for sequence in sequences for row in sequence) == sorted(rows)
    assert all(lengths[sequence].sum() <= 1024 for sequence in sequences)


@pytest.mark.parametrize(("sequences", "expected"), [(1, 6), (6, 6), (7, 12)])
def test_sequences_are_rounded_up_to_split_over_micro_batches_and_devices(sequences, expected):
    assert Layout(8, 16, accumulation=2, shards=3).round_up(sequences) == expected


def places(steps: list[np.ndarray], layout: Layout) -> tuple[int, int]:
    """(sequences, tokens of each) of a batch that has room for any of these steps."""
    length, laid_out = lay_out_steps(steps, layout)
    return layout.round_up(max(map(len, laid_out))), length


@pytest.mark.parametrize("packed", [True, False])
def test_sequences_are_no_longer_than_their_rows_need(packed):
    rows = np.full(8, 100)
    assert places([rows], Layout(8, 4096, packed=packed)) == ((1, 896) if packed else (8, 128))
    assert places([rows], Layout(8, 896, packed=packed)) == ((1, 896) if packed else (8, 128))


def test_the_length_with_the_fewest_places_is_taken():
    nine = [np.full(9, 110)]
    assert places(nine, Layout(9, 1024)) == (1, 1024)
    assert places(nine, Layout(9, 896)) == (3, 384)  # two of 896 would be 1,792 places
    assert places(nine, Layout(9, 896, shards=4)) == (4, 384)


def test_the_fullest_step_decides_and_each_step_keeps_its_rows():
    steps = [np.full(3, 120), np.full(8, 120), np.full(5, 120)]
    length, laid_out = lay_out_steps(steps, Layout(8, 2048))
    assert length == 1024
    assert [sorted(row for sequence in step for row in sequence) for step in laid_out] == [
        [*range(len(rows))] for rows in steps
    ]


@pytest.mark.parametrize("sequence_length", [60, 100, 1000])
def test_sequences_as_short_as_a_tile_or_as_long_as_asked_for_stay_so(sequence_length):
    """What fills them needs no other length, and what is shorter than a tile has none."""
    rows = np.full(6, sequence_length)
    assert places([rows], Layout(6, sequence_length)) == (6, sequence_length)


def test_sequences_that_may_be_longer_hold_small_batches_in_fewer_places():
    lengths = realistic_lengths(longest=600)
    steps = [lengths[batch] for batch in batches_of(lengths, 16)]
    of_1024, of_2048, of_4096 = (np.prod(places(steps, Layout(16, length))) for length in (1024, 2048, 4096))
    assert of_4096 <= of_2048 <= of_1024
    assert of_4096 < max(step.sum() for step in steps) + 2 * 128
