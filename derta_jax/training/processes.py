"""The processes of a pod: they meet before anything else, agree on small values, and end together.

JAX's own coordination service carries all of it, so nothing here needs a device. Three promises: a process that did
not start is named within `start_timeout`; one that fails tells the others why, and they stop within seconds; one that
dies without a word is missed within `heartbeat_timeout`.
"""

import contextlib
import json
import os
import socket
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
from jax._src import clusters, distributed  # the coordinator's address and key-value store have no public names

from derta_jax.config import Processes
from derta_jax.errors import RunFailed, StoppedEarly, UserError
from derta_jax.training.roll_call import call_roll

POLL_SECONDS = 1.0
SETTLE_SECONDS = 3 * POLL_SECONDS
"""How long a failing process stays, so that the others can read why."""

_calls: Counter[str] = Counter()
_lock = threading.Lock()


class Cluster(NamedTuple):
    """Where the processes meet, how many they are, and which of them this one is."""

    address: str
    count: int
    index: int


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
        if not 0 <= cluster.index < cluster.count:
            raise UserError(f"JAX_PROCESS_ID={cluster.index} is not below JAX_NUM_PROCESSES={cluster.count}")
    elif os.environ.get("JAX_PLATFORMS") == "cpu":
        return None
    else:
        found = clusters.ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, 60)
        if None in found[:3]:
            return None
        cluster = Cluster(*found[:3])
    return cluster if cluster.count > 1 else None


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
    call_roll(cluster.address, cluster.count, cluster.index, settings.start_timeout)
    # SIGTERM is ours: the loop saves and stops
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(
        *cluster,
        initialization_timeout=round(settings.start_timeout),
        # ours comes first and says more
        heartbeat_timeout_seconds=round(3 * settings.heartbeat_timeout),
        shutdown_timeout_seconds=round(settings.heartbeat_timeout),
    )
    watchdog = _Watchdog(settings.heartbeat_timeout)
    watchdog.start()
    try:
        yield
        barrier("the end", settings.barrier_timeout)
    except StoppedEarly:
        barrier("the end", settings.barrier_timeout)
        raise
    except BaseException as error:
        watchdog.report(error)
        raise
    finally:
        watchdog.stop()
    jax.distributed.shutdown()


def index() -> int:
    """This process's number; the first is 0."""
    return distributed.global_state.process_id


def count() -> int:
    """How many processes there are."""
    return distributed.global_state.num_processes


def gather(name: str, value: Any, timeout: float = 600.0) -> list[Any]:
    """Every process's JSON `value`, in their order. All must call this equally often under the same name.

    Raises `RunFailed` naming those that did not call within `timeout` seconds.
    """
    if count() == 1:
        return [value]
    place = _place(name)
    _client().key_value_set(f"{place}/{index()}", json.dumps(value))
    deadline = time.monotonic() + timeout
    values: list[Any] = []
    missing = []
    for process in range(count()):
        text = _wait_for(f"{place}/{process}", deadline)
        values.append(None if text is None else json.loads(text))
        if text is None:
            missing.append(process)
    if missing:
        raise RunFailed(
            f"process {', '.join(map(str, missing))} of {count()} did not come to “{name}” in {timeout:g} s"
        )
    return values


def barrier(name: str, timeout: float = 600.0) -> None:
    """Return when all processes are here. Raises `RunFailed` as `gather` does."""
    gather(name, None, timeout)


def first_does(name: str, work: Callable[[], None], timeout: float = 6 * 3600.0) -> None:
    """Process 0 does the work, the others wait for it. Its errors are the others' too: the watchdog ends them."""
    if index() == 0:
        work()
    if count() > 1:
        place = _place(name)
        if index() == 0:
            _client().key_value_set(place, "done")
        elif _wait_for(place, time.monotonic() + timeout) is None:
            raise RunFailed(f"process 0 was not done with “{name}” in {timeout:g} s")


def leave(code: int) -> None:
    """End this process now, if it is one of several: the interpreter's own exit would wait for the others."""
    if jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _client() -> Any:
    return distributed.global_state.client


def _place(name: str) -> str:
    with _lock:
        _calls[name] += 1
        return f"derta/{name}/{_calls[name]}"


def _wait_for(key: str, deadline: float) -> str | None:
    """The value of a key, or None if nobody has set it by then; looked at once at least."""
    while True:
        left = max(0.001, deadline - time.monotonic())
        try:
            return _client().blocking_key_value_get(key, round(1000 * min(left, 5.0)))
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
        if time.monotonic() >= deadline:
            return None


class _Watchdog(threading.Thread):
    """Tells the others that this process lives, and ends it when one of them failed or fell silent."""

    def __init__(self, heartbeat_timeout: float):
        super().__init__(name="derta-watchdog", daemon=True)
        self.heartbeat_timeout = heartbeat_timeout
        self.stopped = threading.Event()

    def run(self) -> None:
        last_seen = dict.fromkeys(range(count()), ("", time.monotonic()))
        beat = 0
        while not self.stopped.wait(POLL_SECONDS):
            beat += 1
            try:
                _client().key_value_set(f"derta/alive/{index()}", str(beat), allow_overwrite=True)
                beats = dict(_client().key_value_dir_get("derta/alive/"))
                failure = dict(_client().key_value_dir_get("derta/failure/"))
            except jax.errors.JaxRuntimeError:
                if not self.stopped.is_set():
                    self._end("process 0, which the others meet at, is gone")
                return
            now = time.monotonic()
            if failure:
                self._end(next(iter(failure.values())))
            for process, (before, since) in last_seen.items():
                beats_now = beats.get(f"derta/alive/{process}", "")
                if beats_now != before:
                    last_seen[process] = (beats_now, now)
                elif now - since > self.heartbeat_timeout and not self.stopped.is_set():
                    silent = f"process {process} has not been heard of for {now - since:.0f} s: it died, or its network"
                    self._publish(json.dumps([1, silent]))
                    self._end(json.dumps([1, silent]))

    def report(self, error: BaseException) -> None:
        """Tell the others why this process ends; give them the time to read it."""
        if isinstance(error, UserError | RunFailed):
            code, text = (2 if isinstance(error, UserError) else 1), str(error)
        else:
            code, text = 1, "".join(traceback.format_exception_only(error)).strip()
        first = self._publish(json.dumps([code, f"process {index()} ({socket.gethostname()}) failed: {text}"]))
        if first is not None:
            print(f"derta: {json.loads(first)[1]}", file=sys.stderr)
        time.sleep(SETTLE_SECONDS)

    def stop(self) -> None:
        self.stopped.set()

    def _publish(self, failure: str) -> str | None:
        """The first failure wins; returns the one that was there before, if there was."""
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            try:
                _client().key_value_set("derta/failure/first", failure)
            except jax.errors.JaxRuntimeError:
                return _client().key_value_try_get("derta/failure/first")
        return None

    def _end(self, failure: str) -> None:
        if self.stopped.is_set():
            return
        try:
            code, text = json.loads(failure)
        except ValueError:
            code, text = 1, failure
        print(f"\nderta: {text}\nderta: all processes stop; the same command resumes", file=sys.stderr, flush=True)
        if index() == 0:
            time.sleep(SETTLE_SECONDS)
        os._exit(code)
