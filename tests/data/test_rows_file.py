"""Rows come back from their file as they were, or not at all."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from etils import epath

from derta_jax.data.pipeline import TrainingRows
from derta_jax.data.rows_file import DamagedRows, read_rows, write_rows
from derta_jax.data.tokenise import Region, TokenRow
from tests.training.bucket import bucket

__all__ = ["bucket"]


def row(number: int, **changes) -> TokenRow:
    """Every row another length; every third is RTO, every fourth was cut, every other has a prefix."""
    regions = np.full(number + 2, Region.RESPONSE, np.uint8)
    regions[-1] = Region.EOS
    return dataclasses.replace(
        TokenRow(
            id=f"triple-{number}#é 東京 😀\n",
            recipe=("derta", "helpful")[number % 2],
            token_ids=np.arange(number + 2, dtype=np.int32) * 1_000_003,
            regions=regions,
            stream="mle" if number % 3 else "rto",
            pair=f"pair {number // 2}" if 4 <= number < 8 else None,
            prefix_words=number if number % 2 else None,
            truncated=number % 4 == 0,
        ),
        **changes,
    )


DATA = TrainingRows([row(i) for i in range(20)], [row(30, id="cut")], "0123456789abcdef", {"triple": 6, "helpful": 9})


@pytest.fixture
def file(tmp_path) -> epath.Path:
    """`DATA`, written."""
    path = epath.Path(tmp_path / "rows" / "train.rows")
    write_rows(path, DATA, "key")
    return path


def as_values(data: TrainingRows) -> list:
    """Comparable with `==`, dtypes included."""
    rows = [
        {name: (str(np.asarray(value).dtype), np.asarray(value).tolist()) for name, value in vars(row).items()}
        for row in (*data.rows, *data.unlabelled)
    ]
    return [rows, len(data.rows), data.content_hash, data.counts]


def test_rows_come_back_as_they_were(file):
    assert as_values(read_rows(file, "key")) == as_values(DATA)


@pytest.mark.parametrize("kept", [0, 1])
@pytest.mark.parametrize("unlabelled", [0, 1])
def test_there_may_be_no_rows_of_either_sort(tmp_path, kept, unlabelled):
    data = TrainingRows([row(3)] * kept, [row(4)] * unlabelled, "0123456789abcdef", {})
    write_rows(epath.Path(tmp_path / "train.rows"), data, "key")
    assert as_values(read_rows(epath.Path(tmp_path / "train.rows"), "key")) == as_values(data)


def test_rows_share_the_memory_of_the_file_and_cannot_be_written_to(file):
    one, other, *_ = read_rows(file, "key").rows
    for name in ("token_ids", "regions"):
        assert getattr(one, name).base is getattr(other, name).base
        assert getattr(one, name).flags.aligned
        with pytest.raises(ValueError, match="read-only"):
            getattr(one, name)[0] = 1


def test_nothing_else_is_left_beside_the_file(file):
    assert list(file.parent.iterdir()) == [file]


def test_writing_again_replaces_the_file(file):
    data = dataclasses.replace(DATA, rows=DATA.rows[:3])
    write_rows(file, data, "key")
    assert as_values(read_rows(file, "key")) == as_values(data)


def test_rows_live_in_a_bucket_as_on_a_disk(bucket):
    path = epath.Path(bucket) / "rows" / "train.rows"
    write_rows(path, DATA, "key")
    assert as_values(read_rows(path, "key")) == as_values(DATA)
    assert list(path.parent.iterdir()) == [path]


def test_a_missing_file_is_said_to_be_missing(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_rows(epath.Path(tmp_path / "train.rows"), "key")


def test_rows_that_were_made_from_something_else_are_refused(file):
    with pytest.raises(DamagedRows, match="made from something else"):
        read_rows(file, "another key")


def test_a_file_that_is_cut_anywhere_is_refused(file):
    whole = file.read_bytes()
    for length in {*range(0, len(whole), 7), len(whole) - 1}:
        file.write_bytes(whole[:length])
        with pytest.raises(DamagedRows, match="cut off"):
            read_rows(file, "key")


def test_a_file_with_a_flipped_bit_anywhere_is_refused(file):
    whole = file.read_bytes()
    for place in {*range(200), *range(0, len(whole), 5), len(whole) - 1}:
        content = bytearray(whole)
        content[place] ^= 1 << place % 8
        file.write_bytes(content)
        with pytest.raises(DamagedRows, match="not those that were written"):
            read_rows(file, "key")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"derta rows 2 " + b"0" * 500, bytes(10_000)])
def test_a_foreign_file_is_refused(file, content):
    file.write_bytes(content)
    with pytest.raises(DamagedRows):
        read_rows(file, "key")


def test_more_at_the_end_is_refused(file):
    file.write_bytes(file.read_bytes() + b"\0")
    with pytest.raises(DamagedRows):
        read_rows(file, "key")


def test_a_directory_that_cannot_be_made_is_an_error_of_the_disk(tmp_path):
    Path(tmp_path / "rows").write_text("a file")
    with pytest.raises(OSError, match="rows"):
        write_rows(epath.Path(tmp_path / "rows" / "train.rows"), DATA, "key")
