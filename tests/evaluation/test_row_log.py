"""Rows that survive whatever ends the process that makes them."""

import json
import subprocess
import sys

import pytest

from derta_jax.errors import UserError
from derta_jax.evaluation.row_log import RowLog

SETTINGS = {"temperature": 0.0, "model": "kites"}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "made" / "rows.jsonl"


def test_what_was_written_is_there_when_it_is_opened_again(path):
    with RowLog(path, SETTINGS) as log:
        log.add(3, {"text": "naïve\u2028東京"})
        log.add(0, {"text": ""})
    with RowLog(path, SETTINGS) as log:
        assert log.rows == {3: {"text": "naïve\u2028東京"}, 0: {"text": ""}}
        log.add(1, {"text": "more"})
    with RowLog(path, SETTINGS) as log:
        assert sorted(log.rows) == [0, 1, 3]


def test_a_killed_process_loses_none_of_its_rows(path):
    script = f"""
import os, pathlib, signal
from derta_jax.evaluation.row_log import RowLog
log = RowLog(pathlib.Path({str(path)!r}), {SETTINGS!r})
for number in range(5):
    log.add(number, {{"text": "x" * 1000}})
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", script]).returncode == -9
    with RowLog(path, SETTINGS) as log:
        assert list(log.rows) == list(range(5))


@pytest.mark.parametrize("cut", range(1, 25))
def test_a_line_that_was_cut_off_counts_as_not_written(path, cut):
    with RowLog(path, SETTINGS) as log:
        log.add(0, {"text": "a"})
        log.add(1, {"text": "naïve"})
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    with RowLog(path, SETTINGS) as log:
        assert list(log.rows) == [0]
        log.add(1, {"text": "naïve"})
    assert path.read_bytes() == whole


def test_a_file_cut_off_in_its_first_line_starts_over(path):
    with RowLog(path, SETTINGS):
        pass
    path.write_bytes(path.read_bytes()[:-3])
    with RowLog(path, SETTINGS) as log:
        assert log.rows == {}


def test_other_settings_are_refused_and_named(path):
    with RowLog(path, SETTINGS) as log:
        log.add(0, {"text": "a"})
    with pytest.raises(UserError) as refused:
        RowLog(path, {"temperature": 1.0, "model": "kites", "seed": 3})
    message = str(refused.value)
    assert f"{path} was written with other settings" in message
    assert "temperature: 0.0 there, 1.0 here" in message
    assert "seed: None there, 3 here" in message
    assert "model" not in message.split("\n", 1)[1].split("Go on")[0]
    with RowLog(path, SETTINGS) as log:
        assert log.rows == {0: {"text": "a"}}


def test_two_processes_do_not_write_to_one_file(path):
    with RowLog(path, SETTINGS), pytest.raises(UserError, match="is being written by another process"):
        RowLog(path, SETTINGS)


@pytest.mark.parametrize("damage", ["not json\n", "[1]\n", '{"text": "no number"}\n'])
def test_a_damaged_file_is_named(path, damage):
    with RowLog(path, SETTINGS):
        pass
    with path.open("a") as file:
        file.write(damage)
    with pytest.raises(UserError, match="is damaged"):
        RowLog(path, SETTINGS)


def test_the_first_line_says_what_the_rows_are_of(path):
    with RowLog(path, SETTINGS):
        pass
    assert json.loads(path.read_text().splitlines()[0]) == {"settings": SETTINGS}
