"""The pod that this process is part of: finding it, meeting the others, and parting from them.

Three promises: a process that did not start is named within `start_timeout`; one that fails tells the others why, and
they stop within seconds; one that dies without a word is missed within `heartbeat_timeout`.
"""

import contextlib
import os
import sys
import traceback
from collections.abc import Iterator
from typing import NamedTuple

import jax
from jax._src import clusters  # where the coordinator is has no public name

from derta_jax.config import Processes
from derta_jax.errors import RunFailed, StoppedEarly, UserError
from derta_jax.training.pod.processes import be_patient
from derta_jax.training.pod.roll_call import call_roll
from derta_jax.training.pod.watchdog import Watchdog, explain_abort


class Cluster(NamedTuple):
    """Where the processes meet, how many they are, and which of them this one is."""

    address: str
    size: int
    number: int


def find_cluster() -> Cluster | None:
    """The pod that this process is part of, or None where it is alone.

    `JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID` say it explicitly; otherwise JAX asks the TPU
    metadata, Slurm, Kubernetes or Open MPI. Raises `UserError` when only some of the three are set.
    """
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    given = {name: value for name in names if (value := os.environ.get(name))}
    if given:
        if len(given) < len(names):
            raise UserError(f"set all of {', '.join(names)}, or none: only {', '.join(given)} is set")
        try:
            cluster = Cluster(given[names[0]], int(given[names[1]]), int(given[names[2]]))
        except ValueError as error:
            raise UserError(f"JAX_NUM_PROCESSES and JAX_PROCESS_ID must be whole numbers: {given}") from error
        if not 0 <= cluster.number < cluster.size:
            raise UserError(f"JAX_PROCESS_ID={cluster.number} is not below JAX_NUM_PROCESSES={cluster.size}")
    elif os.environ.get("JAX_PLATFORMS") == "cpu":
        return None
    else:
        find = clusters.ClusterEnv.auto_detect_unset_distributed_params
        address, size, number, _ = find(None, None, None, None, None, 60)
        if address is None or size is None or number is None:
            return None
        cluster = Cluster(address, size, number)
    return cluster if cluster.size > 1 else None


@contextlib.contextmanager
def joined(settings: Processes) -> Iterator[None]:
    """Meet the other processes, if there are any, and stay with them to the end.

    Raises `RunFailed` naming the processes that did not come. Inside, whatever ends this process with an error ends
    all of them, and a process that dies ends the others, each with the first error printed.
    """
    cluster = find_cluster()
    if cluster is None or jax.distributed.is_initialized():
        yield
        return
    call_roll(*cluster, settings.start_timeout)
    if cluster.number:
        explain_abort(cluster.address)
    # SIGTERM is ours: the loop saves and stops
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(
        *cluster,
        # all were there a moment ago
        initialization_timeout=round(settings.heartbeat_timeout),
        # ours comes first and says more
        heartbeat_timeout_seconds=round(3 * settings.heartbeat_timeout),
        shutdown_timeout_seconds=round(settings.heartbeat_timeout),
    )
    be_patient(settings.barrier_timeout)
    watchdog = Watchdog(settings.heartbeat_timeout)
    watchdog.start()
    try:
        yield
    except StoppedEarly:
        watchdog.part()
        raise
    except (UserError, RunFailed, KeyboardInterrupt) as error:
        watchdog.report(error)
        raise
    except BaseException as error:
        watchdog.report(error)
        traceback.print_exc()
        leave(1)
    watchdog.part()


def leave(code: int) -> None:
    """End this process now, if it has not parted from the others: the interpreter's own exit would wait for them."""
    if jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
