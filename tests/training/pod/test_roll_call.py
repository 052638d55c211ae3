"""The roll call over real sockets; the processes are threads here, for nothing in it needs JAX."""

import socket
import time
from concurrent.futures import ThreadPoolExecutor

from derta_jax.errors import RunFailed
from derta_jax.training.pod.roll_call import call_roll
from tests.training.pod.start import free_port


def call(present: dict[int, int], count: int, timeout: float, port: int | None = None) -> dict[int, str]:
    """Each process of `present` (its number, and how many it expects) calls; what each was told, "" if all is well."""
    address = f"127.0.0.1:{port or free_port()}"

    def one(index: int) -> str:
        try:
            call_roll(address, present[index], index, timeout)
        except RunFailed as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(count) as pool:
        return dict(zip(present, pool.map(one, present), strict=True))


def test_all_go_on_when_all_have_come():
    assert call(dict.fromkeys(range(8), 8), 8, timeout=20) == dict.fromkeys(range(8), "")


def test_the_same_port_can_be_used_at_once_again():
    port = free_port()
    for _ in range(3):
        assert call({0: 3, 1: 3, 2: 3}, 3, 20, port) == {0: "", 1: "", 2: ""}
        # as JAX does, right after
        socket.create_server(("", port)).close()


def test_those_that_did_not_come_are_named_to_all_that_did():
    start = time.monotonic()
    told = call({0: 5, 1: 5, 3: 5}, 5, timeout=1.0)
    expected = "expected 5 processes, saw 3 within 1 s (missing: 2, 4); did you use --worker=all?"
    assert told == {0: expected, 1: expected, 3: expected}
    assert time.monotonic() - start < 5


def test_without_process_0_the_others_say_so():
    told = call({1: 3, 2: 3}, 3, timeout=1.0)
    for index, text in told.items():
        assert text.startswith(f"process {index} of 3 found nobody at 127.0.0.1:")
        assert text.endswith("process 0 has not started, or cannot be reached; did you use --worker=all?")


def test_processes_that_expect_different_numbers_are_told():
    told = call({0: 3, 1: 2}, 3, timeout=20)
    assert told[0] == told[1]
    assert "process 0 expects 3 processes, but process 1 2: set JAX_NUM_PROCESSES to the same number" in told[0]


def test_a_port_that_another_program_holds_is_told():
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        told = call({0: 2}, 2, 1.0, port)
    assert f"port {port}, where the processes meet, cannot be had" in told[0]
    assert "another run is using it" in told[0]


def test_a_port_that_the_run_before_still_holds_is_waited_for():
    with ThreadPoolExecutor(1) as pool:
        with socket.create_server(("", 0)) as server:
            port = server.getsockname()[1]
            told = pool.submit(call, {0: 2, 1: 2}, 2, 20, port)
            time.sleep(1.0)
        assert told.result() == {0: "", 1: ""}


def test_visitors_that_are_no_processes_do_not_disturb():
    port = free_port()
    with ThreadPoolExecutor(1) as pool:
        told = pool.submit(call, {0: 2}, 2, 20, port)
        for words in (b"GET / HTTP/1.1\r\n\r\n", b"", b"[1]\n", b'{"count": 2}\n'):
            visit(port, words)
        assert call_as(1, port) == ""
        assert told.result() == {0: ""}


def visit(port: int, words: bytes) -> None:
    deadline = time.monotonic() + 10
    while True:
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
                connection.sendall(words)
            return
        except ConnectionRefusedError:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def call_as(index: int, port: int) -> str:
    return call({index: 2}, 2, 20, port)[index]
