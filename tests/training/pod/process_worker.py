"""One process of a small pod: `python process_worker.py SCENARIO`. Not a test: `test_processes.py` starts several."""

import json
import os
import signal
import sys
import threading
import time

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from derta_jax.config import Processes, RunConfig
from derta_jax.errors import RunFailed, UserError
from derta_jax.training.pod import cluster, processes

LONG = 60.0


def meet() -> None:
    """Everything that processes do together, from the main thread and from another one at the same time."""
    index = processes.index()
    first: list[str] = []
    others: list[list] = []
    saver = threading.Thread(target=lambda: others.extend(processes.gather("saver", [index, i]) for i in range(5)))
    saver.start()
    values = [processes.gather("loop", {"index": index, "round": i, "text": "é\n"}) for i in range(5)]
    processes.barrier("middle")
    processes.first_does("prepare", lambda: first.append("done"))
    saver.join()
    print(json.dumps({"values": values, "others": others, "first": first}))


def crash() -> None:
    if is_last():
        raise ValueError("the last one fell over")
    time.sleep(LONG)


def crash_of_the_first() -> None:
    if processes.index() == 0:
        raise ValueError("the first one fell over")
    processes.barrier("never", LONG)


def mistake() -> None:
    if processes.index() == 0:
        raise UserError("data.path: no such file")
    processes.first_does("prepare", lambda: None)


def mistake_of_all() -> None:
    raise UserError("mesh.fsdp does not fit")


def absent() -> None:
    if is_last():
        time.sleep(LONG)
    processes.barrier("checkpoint", 3.0)


def absent_at_the_end() -> None:
    if is_last():
        time.sleep(LONG)


def killed() -> None:
    if is_last():
        os.kill(os.getpid(), signal.SIGKILL)
    processes.barrier("never", LONG)


def killed_among_sums() -> None:
    """The last process is killed while the devices of all compute together."""
    everywhere = Mesh(jax.devices(), "x")
    ones = jax.device_put(jnp.ones(jax.device_count()), NamedSharding(everywhere, PartitionSpec("x")))
    total = jax.jit(lambda x: x.sum(), out_shardings=NamedSharding(everywhere, PartitionSpec()))
    for step in range(10**6):
        if step == 5 and is_last():
            os.kill(os.getpid(), signal.SIGKILL)
        total(ones).block_until_ready()


def killed_first() -> None:
    if processes.index() == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(LONG)


def frozen_first() -> None:
    """Process 0 neither answers nor goes away, like a machine that lost its network."""
    if processes.index() == 0:
        os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(LONG)


def devices_that_do_not_come() -> None:
    """The last process does not start its devices, and those of the others wait for them."""
    from rich.console import Console

    from derta_jax.training.pod import doctor  # takes seconds, and no other scenario needs it

    nowhere = {"path": "nowhere"}
    train = {"output": "nowhere", "steps": 1}
    raw = {"model": nowhere, "data": nowhere, "train": train, "processes": {"start_timeout": 5}}
    if is_last():
        doctor.wait_for_devices = lambda: time.sleep(LONG)
    doctor.run_checks(RunConfig.model_validate(raw), Console(quiet=True))


def is_last() -> bool:
    return processes.index() == processes.count() - 1


def main(scenario: str) -> int:
    settings = Processes(
        start_timeout=5 if scenario == "alone" else LONG,
        heartbeat_timeout=5 if scenario.startswith(("killed", "frozen")) else 20,
        barrier_timeout=3,
    )
    try:
        with cluster.joined(settings):
            print("joined", flush=True)
            globals()[scenario]()
    except (UserError, RunFailed) as error:
        print(f"derta: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    return 0


if __name__ == "__main__":
    code = main(sys.argv[1])
    cluster.leave(code)
    sys.exit(code)
