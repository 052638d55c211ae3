import json
import os
import signal
import subprocess
import sys
import time

import pytest

from derta_jax.training.watching.goodput import FILE, Ledger, format_goodput, process_started
from tests.training.bucket import bucket

__all__ = ["bucket"]

NAP = 0.03


def attempts_in(directory):
    return [json.loads(line) for line in (directory / FILE).read_text().splitlines()]


def test_every_moment_counts_once_for_the_innermost_category(tmp_path):
    began = time.time()
    with Ledger(tmp_path) as ledger:
        ledger.begin(0)
        with ledger.spending("step"):
            time.sleep(NAP)
            with ledger.spending("checkpoint"):
                time.sleep(2 * NAP)
                with ledger.spending("input"):
                    time.sleep(NAP)
            time.sleep(NAP)
        seconds = ledger.seconds()
        wall = time.time() - began
    assert seconds["step"] >= 2 * NAP
    assert seconds["checkpoint"] >= 2 * NAP
    assert seconds["input"] >= NAP
    assert sum(seconds.values()) == pytest.approx(wall, abs=NAP / 2)


def test_time_before_the_run_begins_is_start_up_and_later_time_of_no_category_other(tmp_path):
    with Ledger(tmp_path, started=time.time() - 5) as ledger:
        time.sleep(NAP)
        ledger.begin(0)
        time.sleep(NAP)
        seconds = ledger.seconds()
    assert seconds["start"] >= 5 + NAP
    assert seconds["other"] >= NAP


def test_an_error_inside_ends_the_category(tmp_path):
    with Ledger(tmp_path) as ledger:
        ledger.begin(0)
        with pytest.raises(ValueError, match="mine"), ledger.spending("load"):
            raise ValueError("mine")
        before = ledger.seconds()["load"]
        time.sleep(NAP)
        assert ledger.seconds()["load"] == before


def test_steps_that_an_earlier_attempt_had_done_are_repeated(tmp_path):
    def attempt(start, steps):
        with Ledger(tmp_path) as ledger:
            ledger.begin(start)
            with ledger.spending("step"):
                for step in range(start + 1, start + steps + 1):
                    time.sleep(NAP)
                    ledger.finished(step)
            return ledger.summary()

    assert attempt(0, 4)["steps_repeated"] == 0
    summary = attempt(2, 4)
    assert summary["attempts"] == 2
    assert summary["steps_repeated"] == 2
    assert summary["seconds"]["repeated"] >= 2 * NAP
    assert summary["seconds"]["step"] >= 6 * NAP
    assert summary["goodput"] == pytest.approx(summary["seconds"]["step"] / summary["total_seconds"])


def test_a_better_witness_of_the_last_step_is_believed(tmp_path):
    with Ledger(tmp_path) as ledger:
        ledger.begin(2, reached=3)
        for step in (3, 4):
            ledger.finished(step)
        assert ledger.summary()["steps_repeated"] == 1


KILLED = """
import os, signal, sys, time
from derta_jax.training.watching.goodput import Ledger
ledger = Ledger(sys.argv[1], interval=0.02)
ledger.begin(0)
with ledger.spending("step"):
    for step in (1, 2, 3):
        time.sleep(0.05)
        ledger.finished(step)
    time.sleep(0.1)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_of_a_killed_attempt_all_but_the_last_moments_are_known_and_the_pause_is_down_time(tmp_path):
    ended = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], env={**os.environ, "JAX_PLATFORMS": "cpu"})
    assert ended.returncode == -signal.SIGKILL
    (killed,) = attempts_in(tmp_path)
    assert killed["last_step"] == 3
    assert killed["seconds"]["step"] > 0.15
    time.sleep(0.1)
    with Ledger(tmp_path) as ledger:
        ledger.begin(2)
        summary, now = ledger.summary(), time.time()
    assert 0.1 <= summary["seconds"]["down"] < now - killed["alive"]
    assert summary["total_seconds"] == pytest.approx(now - killed["started"], abs=0.1)
    first, second = attempts_in(tmp_path)
    assert first == killed
    assert second["attempt"] == 2


def test_a_line_that_was_cut_off_is_left_out(tmp_path):
    (tmp_path / FILE).write_text('{"attempt": 1, "sta')
    with Ledger(tmp_path) as ledger:
        ledger.begin(0)
        assert ledger.summary()["attempts"] == 1


def test_a_run_that_never_began_leaves_no_trace(tmp_path):
    with Ledger(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_attempts_are_kept_in_a_bucket(bucket):
    for expected in (1, 2):
        with Ledger(bucket) as ledger:
            ledger.begin(0)
            assert ledger.summary()["attempts"] == expected


def test_this_process_began_before_now():
    assert time.time() - 86_400 < process_started() < time.time()


def test_the_line_says_where_the_time_went():
    summary = {
        "attempts": 2,
        "total_seconds": 7384.0,
        "seconds": {
            "step": 6719.44,
            "compile": 221.5,
            "checkpoint": 73.8,
            "held_out": 0.0,
            "input": 2.0,
            "start": 147.7,
            "repeated": 140.0,
            "down": 79.56,
        },
        "goodput": 0.91,
        "steps_repeated": 14,
    }
    assert format_goodput(summary) == (
        "goodput   91% of 2:03:04 in steps: compile 3%, checkpoint 1%, input 0%, start 2%, restarts 3% "
        "(2 attempts, 14 steps done again)"
    )
