"""Real processes that meet, agree, fail and are killed: the others say why within seconds, and end."""

import json
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from derta_jax.errors import UserError
from derta_jax.training.pod.cluster import Cluster, find_cluster
from derta_jax.training.pod.processes import barrier, first_does, gather
from tests.training.pod.workers import Ended, run_workers

WORKER = str(Path(__file__).with_name("process_worker.py"))
NOTICED = 20.0
"""Seconds: 5 of the heartbeat here, a poll, and 3 that process 0 stays for the others to read; and a busy machine."""


@pytest.fixture(scope="module")
def outcome() -> Iterator[Callable[[str], dict[int, Ended]]]:
    """How the processes of a scenario ended; all scenarios run at once, three at a time: they mostly wait."""
    with ThreadPoolExecutor(3) as pool:
        runs: dict[str, Future] = {
            "meet": pool.submit(run_workers, [WORKER, "meet"], 3),
            "only the first": pool.submit(run_workers, [WORKER, "alone"], 2, [0]),
            "only the last": pool.submit(run_workers, [WORKER, "alone"], 2, [1]),
        }
        for scenario in (
            "crash", "crash_of_the_first", "mistake", "mistake_of_all", "absent", "absent_at_the_end", "killed",
            "killed_among_sums", "killed_first", "frozen_first", "devices_that_do_not_come",
        ):  # fmt: skip
            runs[scenario] = pool.submit(run_workers, [WORKER, scenario])
        yield lambda scenario: runs[scenario].result()


def codes(ended: dict[int, Ended]) -> list[int | None]:
    return [ended[index].code for index in sorted(ended)]


@pytest.mark.slow
def test_processes_that_all_start_meet_and_agree_in_every_thread(outcome):
    ended = outcome("meet")
    assert codes(ended) == [0, 0, 0], ended
    said = [json.loads(ended[index].output.splitlines()[-1]) for index in range(3)]
    for told in said:
        assert told["values"] == [[{"index": i, "round": n, "text": "é\n"} for i in range(3)] for n in range(5)]
        assert told["others"] == [[[i, n] for i in range(3)] for n in range(5)]
    assert [told["first"] for told in said] == [["done"], [], []]


@pytest.mark.slow
def test_a_process_that_did_not_start_is_named_with_the_likely_reason(outcome):
    ended = outcome("only the first")
    assert codes(ended) == [1]
    assert "expected 2 processes, saw 1 within 5 s (missing: 1); did you use --worker=all?" in ended[0].output
    ended = outcome("only the last")
    assert codes(ended) == [1]
    assert "process 0 has not started, or cannot be reached; did you use --worker=all?" in ended[1].output


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scenario", "failed", "text"),
    [
        ("crash", 1, "ValueError: the last one fell over"),
        ("crash_of_the_first", 0, "ValueError: the first one fell over"),
    ],
)
def test_an_uncaught_error_ends_all_and_all_print_it(outcome, scenario, failed, text):
    ended = outcome(scenario)
    assert codes(ended) == [1, 1]
    assert "Traceback" in ended[failed].output
    assert text in ended[failed].output
    other = ended[1 - failed].output
    assert f"process {failed} (" in other
    assert f"failed: {text}\nderta: all processes stop; the same command resumes" in other
    assert abs(ended[0].at - ended[1].at) < NOTICED


@pytest.mark.slow
def test_a_users_mistake_on_one_is_the_exit_code_and_message_of_all(outcome):
    ended = outcome("mistake")
    assert codes(ended) == [2, 2]
    assert "derta: data.path: no such file" in ended[0].output
    assert "failed: data.path: no such file" in ended[1].output


@pytest.mark.slow
def test_a_users_mistake_that_all_find_is_told_once_by_each(outcome):
    ended = outcome("mistake_of_all")
    assert codes(ended) == [2, 2]
    assert [process.output.count("mesh.fsdp does not fit") for process in ended.values()] == [1, 1]


@pytest.mark.slow
@pytest.mark.parametrize(("scenario", "meeting"), [("absent", "checkpoint"), ("absent_at_the_end", "the end")])
def test_a_process_that_does_not_come_to_a_meeting_is_named(outcome, scenario, meeting):
    ended = outcome(scenario)
    assert codes(ended) == [1, 1]
    for process in ended.values():
        assert f"process 1 of 2 did not come to “{meeting}” in 3 s" in process.output


@pytest.mark.slow
@pytest.mark.parametrize("scenario", ["killed", "killed_among_sums"])
def test_a_killed_process_is_missed_and_named(outcome, scenario):
    ended = outcome(scenario)
    assert codes(ended) == [1, -signal.SIGKILL]
    assert "process 1 has not been heard of for" in ended[0].output
    assert ended[0].at - ended[1].at < NOTICED


@pytest.mark.slow
@pytest.mark.parametrize(("scenario", "code"), [("killed_first", -signal.SIGKILL), ("frozen_first", None)])
def test_the_others_say_so_when_process_0_is_killed_or_does_not_answer(outcome, scenario, code):
    ended = outcome(scenario)
    assert codes(ended) == [code, 1]
    assert "process 0, where the others meet, is gone: it died, or its network" in ended[1].output
    assert ended[1].at - ended[0].at < NOTICED


@pytest.mark.slow
def test_devices_that_wait_for_those_of_another_process_do_not_hang(outcome):
    ended = outcome("devices_that_do_not_come")
    assert codes(ended) == [1, 1]
    for process in ended.values():
        assert "the devices were not there within 5 s" in process.output


def test_a_process_alone_agrees_with_itself():
    done: list[str] = []
    assert gather("alone", {"a": 1}) == [{"a": 1}]
    barrier("alone")
    first_does("alone", lambda: done.append("done"))
    assert done == ["done"]


@pytest.mark.parametrize(
    ("address", "size", "number", "expected"),
    [
        ("10.0.0.1:8476", "2", "1", Cluster("10.0.0.1:8476", 2, 1)),
        ("10.0.0.1:8476", "1", "0", None),
        (None, None, None, None),
        ("10.0.0.1:8476", None, "1", "set all of .*only JAX_COORDINATOR_ADDRESS, JAX_PROCESS_ID is set"),
        ("10.0.0.1:8476", "two", "1", "must be whole numbers"),
        ("10.0.0.1:8476", "2", "2", "JAX_PROCESS_ID=2 is not below JAX_NUM_PROCESSES=2"),
    ],
)
def test_the_environment_says_which_process_this_is(monkeypatch, address, size, number, expected):
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    for name, value in zip(names, (address, size, number), strict=True):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    if isinstance(expected, str):
        with pytest.raises(UserError, match=expected):
            find_cluster()
    else:
        assert find_cluster() == expected
