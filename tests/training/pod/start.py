"""A pod on one machine: several real processes of the `derta` command, each with simulated devices, over gloo."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start_pod(arguments: Sequence[str], logs: Path, processes: int = 2, devices: int = 4) -> list[subprocess.Popen]:
    """Start `derta ARGUMENTS` in each process; what process i prints goes to `logs/i.log`."""
    port = free_port()
    logs.mkdir(parents=True, exist_ok=True)
    started = []
    for index in range(processes):
        environment = os.environ | {
            "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
            "JAX_NUM_PROCESSES": str(processes),
            "JAX_PROCESS_ID": str(index),
            "XLA_FLAGS": os.environ.get("XLA_FLAGS", "").replace("device_count=8", f"device_count={devices}"),
        }
        with (logs / f"{index}.log").open("a") as log:
            command = [sys.executable, "-m", "derta_jax.cli", *arguments]
            started.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
    return started


def end_pod(pod: Sequence[subprocess.Popen], timeout: float = 120.0) -> list[int]:
    """The exit codes of all processes; those that do not end in time are killed."""
    deadline = time.monotonic() + timeout
    try:
        return [process.wait(max(0.1, deadline - time.monotonic())) for process in pod]
    finally:
        for process in pod:
            process.kill()


def run_pod(arguments: Sequence[str], logs: Path, processes: int = 2, devices: int = 4) -> list[int]:
    return end_pod(start_pod(arguments, logs, processes, devices))


def wait_until(condition, timeout: float = 60.0) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)
