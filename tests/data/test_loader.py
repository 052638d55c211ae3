"""Batches as a pure function of the step: what they hold, and that nothing else decides it."""

import hashlib
import json
import math
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from derta_jax.data.loader import Batch, Batches, keep_labels
from derta_jax.data.packing import Layout
from derta_jax.data.tokenise import Region, TokenRow
from derta_jax.errors import UserError
from derta_jax.objectives.derta import Derta

PROMPT = 3
LAYOUT = Layout(batch_size=8, sequence_length=64)
STREAMS = Derta.streams


def row(number: int, length: int | None = None, rto: bool | None = None) -> TokenRow:
    """A row whose token ids say which row and which place they are; every third row is RTO unless told."""
    length = length or 8 + number * 7 % 23
    regions = np.full(length, Region.RESPONSE, np.uint8)
    regions[:PROMPT] = Region.PROMPT
    regions[-1] = Region.EOS
    token_ids = np.arange(length, dtype=np.int32) + 1000 * (number + 1)
    refusing = number % 3 == 0 if rto is None else rto
    stream = "rto" if refusing else "mle"
    return TokenRow(f"row-{number}", "derta", token_ids, regions, stream, None, False)


def batches(rows: int = 30, layout: Layout = LAYOUT, steps: int = 12, seed: int = 0, **objective) -> Batches:
    return Batches([row(number) for number in range(rows)], layout, Derta(**objective), seed, steps)


def flat(array: np.ndarray) -> np.ndarray:
    """[accumulation, S, T] → [all sequences, T]."""
    return array.reshape(-1, array.shape[-1])


def rows_in(batch: Batch) -> Counter[int]:
    """Row number → how many of its tokens the batch holds."""
    tokens = batch["token_ids"][batch["segment_ids"] > 0]
    return Counter((tokens // 1000 - 1).tolist())


def assert_same(one: Batch, other: Batch) -> None:
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name])


LAYOUTS = {
    "packed": LAYOUT,
    "one row each": Layout(8, 64, packed=False),
    "accumulated": Layout(8, 64, accumulation=2),
    "sharded": Layout(8, 64, shards=4),
    "accumulated, sharded": Layout(8, 64, accumulation=2, shards=4),
}
DIGESTS = {
    "packed": "bbb124138907e86d",
    "one row each": "3e8796198fc46547",
    "accumulated": "85c666b04ba73847",
    "sharded": "9f080fa332d2418a",
    "accumulated, sharded": "95d345aaeedb3cf6",
}
"""Of twelve batches of thirty rows at a keep rate of 0.3. If they change, no run that was begun before can go on."""

every_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


def digest(source: Batches) -> str:
    """Of all batches: names, dtypes, shapes and values."""
    total = hashlib.sha256()
    for batch in map(source.__getitem__, range(len(source))):
        # as when DeRTa's was the only objective
        as_ever = batch | {"rto": batch["stream"] == STREAMS.index("rto")}
        del as_ever["stream"]
        for name, array in sorted(as_ever.items()):
            total.update(name.encode() + str((array.dtype, array.shape)).encode() + array.tobytes())
    return total.hexdigest()[:16]


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_batches_are_those_that_they_have_always_been(name):
    assert digest(batches(layout=LAYOUTS[name], sorry_keep_rate=0.3)) == DIGESTS[name]


def test_the_batches_of_paper_mode_are_those_that_they_have_always_been():
    source = batches(layout=LAYOUTS["one row each"], sorry_keep_rate=0.3, paper=True)
    assert digest(source) == "0824f03b107658b9"


FRESH_PROCESS = """
import json
from tests.data.test_loader import LAYOUTS, batches, digest
for name, layout in LAYOUTS.items():
    source = batches(layout=layout, sorry_keep_rate=0.3)
    print(json.dumps([name, digest(source), [sorted(source.row_ids(step)) for step in range(12)]]))
"""


def test_other_processes_and_other_meshes_see_the_same_rows_at_each_step():
    environment = os.environ | {"PYTHONHASHSEED": "1"}
    command = [sys.executable, "-c", FRESH_PROCESS]
    root = Path(__file__).parents[2]
    output = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, check=True).stdout
    lines = [json.loads(line) for line in output.splitlines()]
    here = batches(layout=LAYOUTS["packed"])
    assert {name: found for name, found, _ in lines} == DIGESTS
    assert [rows for *_, rows in lines] == [[sorted(here.row_ids(step)) for step in range(12)]] * len(LAYOUTS)


@every_layout
def test_the_ids_of_a_step_are_those_of_its_rows(layout):
    source = batches(layout=layout)
    for step in range(12):
        assert sorted(source.row_ids(step)) == sorted(f"row-{number}" for number in rows_in(source[step]))


@every_layout
def test_a_batch_does_not_depend_on_the_batches_asked_for_before(layout):
    in_order, backwards = batches(layout=layout), batches(layout=layout)
    forward = [in_order[step] for step in range(12)]
    backward = [backwards[step] for step in reversed(range(12))]
    for one, other in zip(forward, reversed(backward), strict=True):
        assert_same(one, other)


@pytest.mark.parametrize("start", [0, 5, 11])
def test_going_on_from_a_step_gives_the_batches_of_the_remaining_steps(start):
    source = batches(sorry_keep_rate=0.3)
    resumed = list(source.iterate(start))
    assert len(resumed) == 12 - start
    for step, batch in enumerate(resumed, start=start):
        assert_same(batch, source[step])


def test_there_is_nothing_to_go_on_with_after_the_last_step():
    assert list(batches().iterate(12)) == []


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.002)


class Watched(Batches):
    """Batches that note which thread made each step, and may be told to take their time or to fail."""

    def __getitem__(self, step: int) -> Batch:
        made.append((step, threading.current_thread()))
        if step == failing_step:
            raise ZeroDivisionError(f"step {step}")
        return super().__getitem__(step)


def watched(steps: int = 200) -> Batches:
    made.clear()
    return Watched([row(number) for number in range(30)], LAYOUT, Derta(), 0, steps)


made: list[tuple[int, threading.Thread]] = []
failing_step = -1


def makers() -> set[threading.Thread]:
    return {thread for _, thread in made if thread.is_alive()}


def test_batches_are_made_ahead_of_the_one_who_takes_them_and_not_by_them():
    ahead = watched().iterate(0, prefetch=3)
    wait_for(lambda: len(made) == 3)
    for taken in range(1, 20):
        next(ahead)
        wait_for(lambda taken=taken: len(made) == taken + 3)  # type: ignore[misc]
    assert threading.current_thread() not in makers()


def test_no_more_is_made_than_was_asked_for():
    ahead = watched().iterate(0, prefetch=3)
    next(ahead)
    time.sleep(0.2)
    assert len(made) == 4


@pytest.mark.parametrize("taken", [0, 1, 5])
def test_the_threads_end_with_an_iteration_that_is_let_go_of(taken):
    ahead = watched().iterate(0)
    for _ in range(taken):
        next(ahead)
    wait_for(lambda: len(made) >= taken + 4)
    assert makers()
    del ahead
    wait_for(lambda: not makers())
    assert len(made) < 20


def test_the_threads_end_with_an_iteration_that_fails():
    def loop() -> None:
        for number, _ in enumerate(source.iterate(0)):
            if number == 3:
                raise KeyError("the loop itself")

    source = watched()
    with pytest.raises(KeyError):
        loop()
    wait_for(lambda: not makers())


def test_the_threads_end_when_all_is_taken():
    assert len(list(watched(steps=12).iterate(0))) == 12
    wait_for(lambda: not makers())


def test_what_goes_wrong_in_a_batch_goes_wrong_where_it_is_taken(monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "failing_step", 6)
    ahead = watched().iterate(0)
    for step in range(6):
        assert_same(next(ahead), batches()[step])
    with pytest.raises(ZeroDivisionError, match="step 6"):
        next(ahead)
    wait_for(lambda: not makers())


def test_the_seed_decides_the_order():
    assert rows_in(batches(seed=0)[0]) != rows_in(batches(seed=1)[0])


def test_more_steps_later_leave_the_rows_of_earlier_ones_as_they_were():
    short, long = batches(steps=4), batches(steps=40)
    assert [short.row_ids(step) for step in range(4)] == [long.row_ids(step) for step in range(4)]


@every_layout
def test_each_epoch_holds_each_row_exactly_once_and_whole(layout):
    source = batches(layout=layout)
    assert source.steps_per_epoch == 4
    for epoch in range(3):
        seen = sum((rows_in(source[4 * epoch + step]) for step in range(4)), Counter[int]())
        assert seen == {number: len(row(number)) for number in range(30)}


def test_epochs_differ_in_order():
    source = batches()
    assert rows_in(source[0]) != rows_in(source[4])


@every_layout
def test_every_batch_has_the_same_shape(layout):
    source = batches(layout=layout)
    shape = (layout.accumulation, source.sequences // layout.accumulation, 64)
    assert {array.shape for step in range(12) for array in source[step].values()} == {shape}
    assert source.sequences % (layout.accumulation * layout.shards) == 0


def test_every_device_gets_a_fair_share_of_the_tokens():
    layout = Layout(batch_size=32, sequence_length=64, accumulation=2, shards=4)
    batch = batches(rows=96, layout=layout, steps=3)[0]
    per_device = (batch["segment_ids"] > 0).reshape(8, -1).sum(1)
    assert per_device.min() > 0.5 * per_device.max()


@every_layout
def test_each_row_lies_in_one_piece_with_a_segment_and_positions_of_its_own(layout):
    source = batches(layout=layout)
    for step in range(4):
        batch = {name: flat(array) for name, array in source[step].items()}
        for sequence, segments in enumerate(batch["segment_ids"]):
            for segment in range(1, segments.max() + 1):
                places = np.flatnonzero(segments == segment)
                tokens = batch["token_ids"][sequence, places]
                expected = row(tokens[0] // 1000 - 1)
                assert list(places) == list(range(places[0], places[0] + len(expected)))
                assert list(tokens) == list(expected.token_ids)
                assert list(batch["positions"][sequence, places]) == list(range(len(expected)))
                assert list(batch["regions"][sequence, places]) == list(expected.regions)
                assert set(batch["stream"][sequence, places]) == {STREAMS.index(expected.stream)}
                assert list(batch["keep"][sequence, places]) == list(expected.labelled)


@pytest.mark.parametrize("packed", [True, False])
def test_short_rows_are_not_padded_to_long_sequences(packed):
    """They lie in sequences of the length that holds them, with the same tokens and labels."""
    long, short = (Batches(batches().rows, Layout(8, length, packed=packed), Derta(), 0, 3) for length in (4096, 64))
    assert long.length % 128 == 0
    assert long.length * long.sequences <= 512 if packed else long.length == 128
    assert long[0]["token_ids"].shape == (1, long.sequences, long.length)
    for step in range(3):
        assert sorted(long.row_ids(step)) == sorted(short.row_ids(step))
        mine, theirs = (np.sort(batch["token_ids"][batch["keep"]]) for batch in (long[step], short[step]))
        np.testing.assert_array_equal(mine, theirs)


def test_segments_are_counted_from_one_in_each_sequence():
    for segments in flat(batches()[0]["segment_ids"]):
        assert set(segments) - {0} == set(range(1, segments.max() + 1))


@every_layout
def test_padding_is_segment_zero_without_label(layout):
    batch = batches(layout=layout)[0]
    padding = batch["segment_ids"] == 0
    assert padding.any()
    assert all(not array[padding].any() for array in batch.values())


def test_packing_puts_several_rows_in_a_sequence():
    assert batches().sequences < 8


def test_without_packing_each_sequence_holds_one_row():
    segments = flat(batches(layout=LAYOUTS["one row each"])[0]["segment_ids"])
    assert segments.shape[0] == 8
    assert segments.max() == 1


@every_layout
@pytest.mark.parametrize("rate", [1.0, 0.3])
def test_label_capacity_is_the_most_labels_that_a_device_of_a_micro_batch_ever_holds(layout, rate):
    source = batches(layout=layout, sorry_keep_rate=rate)
    counts = [source[step]["keep"].reshape(layout.accumulation * layout.shards, -1).sum(1).max() for step in range(12)]
    assert max(counts) == source.label_capacity


def test_label_capacity_bounds_the_paper_draws():
    source = batches(layout=LAYOUTS["one row each"], sorry_keep_rate=0.3, paper=True)
    assert all(source[step]["keep"].sum() <= source.label_capacity for step in range(12))


@pytest.mark.parametrize("rate", [0.01, 0.05, 0.3, 0.5, 0.99, 1.0])
@pytest.mark.parametrize("length", [5, 6, 24, 63])
def test_the_keep_rate_keeps_exactly_its_share_of_an_rto_rows_labels_and_at_least_one(rate, length):
    labels = length - PROMPT
    kept = keep_labels(row(0, length, rto=True), Derta(sorry_keep_rate=rate), 0, 0, length)
    assert kept.sum() == max(1, math.ceil(rate * labels))


def test_only_labels_are_kept():
    rto = row(0, 40, rto=True)
    for epoch in range(20):
        kept = keep_labels(rto, Derta(sorry_keep_rate=0.2), 0, epoch, 40)
        assert not (kept & ~rto.labelled).any()


def test_every_response_position_and_eos_is_kept_now_and_then():
    rto, objective = row(0, 20, rto=True), Derta(sorry_keep_rate=0.2)
    kept = np.stack([keep_labels(rto, objective, 0, epoch, 20) for epoch in range(200)])
    assert kept[:, PROMPT:].any(0).all()


def test_the_keep_rate_leaves_mle_rows_alone():
    mle = row(1, 40, rto=False)
    assert list(keep_labels(mle, Derta(sorry_keep_rate=0.05), 0, 0, 40)) == list(mle.labelled)


def test_what_is_kept_depends_on_seed_epoch_and_row_id_alone():
    objective = Derta(sorry_keep_rate=0.2)

    def kept(number: int = 0, seed: int = 0, epoch: int = 0, padded_length: int = 60) -> list[int]:
        return np.flatnonzero(keep_labels(row(number, 60, True), objective, seed, epoch, padded_length)).tolist()

    assert kept() == kept() == kept(padded_length=64)
    assert len({tuple(places) for places in (kept(), kept(1), kept(seed=1), kept(epoch=1))}) == 4


def test_the_layout_does_not_change_what_is_kept():
    def kept(layout: Layout) -> set[int]:
        source = batches(layout=layout, sorry_keep_rate=0.3)
        return {token for step in range(4) for token in source[step]["token_ids"][source[step]["keep"]].tolist()}

    assert len({frozenset(kept(layout)) for layout in LAYOUTS.values()}) == 1


def test_paper_mode_draws_over_the_padded_row_so_that_few_or_no_labels_survive():
    objective = Derta(sorry_keep_rate=0.05, paper=True)
    counts = [keep_labels(row(n, 23, True), objective, 0, 0, padded_length=200).sum() for n in range(400)]
    assert 0 in counts
    assert max(counts) > 1
    assert np.mean(counts) == pytest.approx(0.05 * 20, rel=0.15)


def test_paper_mode_pads_to_the_longest_row_of_the_micro_batch():
    rows = [row(0, 24, rto=True), row(1, 60, rto=False)]
    objective = Derta(sorry_keep_rate=0.25, paper=True)
    batch = Batches(rows, Layout(2, 64, packed=False), objective, 0, 1)[0]
    tokens = batch["token_ids"][batch["keep"] & (batch["stream"] == STREAMS.index("rto"))]
    expected = keep_labels(rows[0], objective, 0, 0, padded_length=60)
    assert sorted(tokens) == list(rows[0].token_ids[expected])


def test_a_batch_without_labels_names_its_rows():
    rows = [row(number, 4, rto=True) for number in range(3)] + [row(3, 60, rto=True)]
    source = Batches(rows, Layout(4, 64, packed=False), Derta(sorry_keep_rate=0.01, paper=True), 1, 50)
    with pytest.raises(UserError, match=r"step \d+: a batch has no labelled token left \(rows row-\d, ") as raised:
        list(source.iterate(0))
    assert {f"row-{number}" for number in range(4)} <= set(str(raised.value).replace(",", "").split())


def test_no_row_at_all_is_the_users_error():
    with pytest.raises(UserError, match=r"raise train\.sequence_length"):
        Batches([], LAYOUT, Derta(), 0, 1)


def test_fewer_rows_than_a_batch_make_one_step_an_epoch():
    source = batches(rows=3)
    assert source.steps_per_epoch == 1
    assert set(rows_in(source[7])) == {0, 1, 2}
