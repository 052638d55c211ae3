"""Several real processes of one pod, started, watched to their ends, and never left behind."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tests.training.pod.start import free_port

ROOT = Path(__file__).parents[3]
LONGEST = 90.0


class Ended(NamedTuple):
    """How a process ended: its exit code (minus the signal that killed it), when (seconds), and what it printed."""

    code: int | None
    at: float
    output: str


def run_workers(
    arguments: Sequence[str],
    count: int = 2,
    started: Sequence[int] | None = None,
    port: int | None = None,
    directories: Sequence[Path] | None = None,
) -> dict[int, Ended]:
    """Run `python ARGUMENTS` in each of the processes `started` (all of `count`), of four devices each.

    Process i runs in `directories[i]`. When only killed and stopped ones are left, or after `LONGEST`, all are killed,
    and those that were still there have the code None.
    """
    address = f"127.0.0.1:{port or free_port()}"
    ended: dict[int, Ended] = {}
    with tempfile.TemporaryDirectory() as logs:
        running: dict[int, subprocess.Popen] = {}
        for index in range(count) if started is None else started:
            environment = os.environ | {
                "PYTHONPATH": str(ROOT),
                "JAX_COORDINATOR_ADDRESS": address,
                "JAX_NUM_PROCESSES": str(count),
                "JAX_PROCESS_ID": str(index),
                "XLA_FLAGS": os.environ.get("XLA_FLAGS", "").replace("device_count=8", "device_count=4"),
            }
            with (Path(logs) / str(index)).open("w") as log:
                running[index] = subprocess.Popen(
                    [sys.executable, *arguments],
                    env=environment,
                    cwd=directories[index] if directories else ROOT,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
        deadline = time.monotonic() + LONGEST
        try:
            while running and time.monotonic() < deadline and not _only_stopped(running):
                for index, process in list(running.items()):
                    if process.poll() is not None:
                        ended[index] = Ended(process.returncode, time.monotonic(), _read(logs, index))
                        del running[index]
                time.sleep(0.02)
        finally:
            for process in running.values():
                process.kill()
                process.wait()
        for index in running:
            ended[index] = Ended(None, time.monotonic(), _read(logs, index))
    return ended


def _only_stopped(running: dict[int, subprocess.Popen]) -> bool:
    files = [Path(f"/proc/{process.pid}/stat") for process in running.values()]
    states = [file.read_text().rpartition(")")[2].split()[0] for file in files]
    return all(state == "T" for state in states)


def _read(logs: str, index: int) -> str:
    return (Path(logs) / str(index)).read_text()
