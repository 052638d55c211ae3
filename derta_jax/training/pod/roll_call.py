"""Who has started? All processes meet at the coordinator's port before JAX does.

JAX's own first meeting ends in an abort of the process that says neither how many came nor what to do.
"""

import contextlib
import json
import socket
import time

from derta_jax.errors import RunFailed

ADVICE = "did you use --worker=all?"
LONGEST_LINE = 4096
PORT_PATIENCE = 30.0
"""Seconds that process 0 waits for the port: a run that has just ended may still hold it."""


def call_roll(address: str, count: int, index: int, timeout: float) -> None:
    """Return when all `count` processes have come to `address` (host:port); process 0 calls, the others answer.

    Raises `RunFailed` that says how many came and who did not, on all that came.
    """
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + timeout
    if index == 0:
        _call(int(port), count, deadline, timeout)
    else:
        _answer(host.strip("[]"), int(port), count, index, deadline, timeout)


def _call(port: int, count: int, deadline: float, timeout: float) -> None:
    present: dict[int, socket.socket] = {}
    verdict = ""
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(_listen(port, min(deadline, time.monotonic() + PORT_PATIENCE)))
        while not verdict and len(present) < count - 1 and (left := deadline - time.monotonic()) > 0:
            server.settimeout(left)
            with contextlib.suppress(TimeoutError):
                connection = stack.enter_context(server.accept()[0])
                connection.settimeout(5.0)
                with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                    hello = json.loads(_read_line(connection))
                    present[int(hello["index"])] = connection
                    if hello["count"] != count:
                        verdict = (
                            f"process 0 expects {count} processes, but process {hello['index']} {hello['count']}: set "
                            "JAX_NUM_PROCESSES to the same number on all"
                        )
        missing = sorted(set(range(1, count)) - set(present))
        if missing and not verdict:
            names = ", ".join(map(str, missing))
            verdict = (
                f"expected {count} processes, saw {len(present) + 1} within {timeout:g} s (missing: {names}); {ADVICE}"
            )
        for connection in present.values():
            with contextlib.suppress(OSError):
                connection.sendall(json.dumps(verdict).encode() + b"\n")
                # the side that closes first keeps the port busy: let it be theirs
                connection.settimeout(5.0)
                connection.recv(1)
    if verdict:
        raise RunFailed(verdict)


def _answer(host: str, port: int, count: int, index: int, deadline: float, timeout: float) -> None:
    while time.monotonic() < deadline:
        try:
            with socket.create_connection((host, port), timeout=5.0) as connection:
                connection.sendall(json.dumps({"count": count, "index": index}).encode() + b"\n")
                connection.settimeout(max(1.0, deadline - time.monotonic() + 10.0))
                verdict = json.loads(_read_line(connection))
        except (OSError, ValueError):
            time.sleep(0.2)
            continue
        if verdict:
            raise RunFailed(verdict)
        return
    raise RunFailed(
        f"process {index} of {count} found nobody at {host}:{port} within {timeout:g} s: process 0 has not started, or "
        f"cannot be reached; {ADVICE}"
    )


def _listen(port: int, deadline: float) -> socket.socket:
    while True:
        for family in (socket.AF_INET6, socket.AF_INET):
            try:
                dualstack = family == socket.AF_INET6
                return socket.create_server(("", port), family=family, backlog=1024, dualstack_ipv6=dualstack)
            except (OSError, ValueError) as error:
                problem = error
        if time.monotonic() >= deadline:
            raise RunFailed(
                f"port {port}, where the processes meet, cannot be had ({problem}): another run is using it, or set "
                "JAX_COORDINATOR_ADDRESS to another one on all processes"
            )
        time.sleep(0.5)


def _read_line(connection: socket.socket) -> str:
    line = b""
    while not line.endswith(b"\n"):
        piece = connection.recv(LONGEST_LINE)
        if not piece or len(line) > LONGEST_LINE:
            raise ValueError("the connection ended")
        line += piece
    return line.decode()
