"""Which of the pod's processes this one is, and small values that all of them agree on.

JAX's own coordination service carries them, so nothing here needs a device, and any thread may ask. Where there is one
process only, there is nobody to ask and nothing to wait for.
"""

import contextlib
import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
from jax._src import distributed  # the key-value store has no public name

from derta_jax.errors import RunFailed

_patience = 600.0
_calls: Counter[str] = Counter()
_lock = threading.Lock()


def index() -> int:
    """This process's number; the first is 0."""
    return distributed.global_state.process_id


def count() -> int:
    """How many processes there are."""
    return distributed.global_state.num_processes


def be_patient(seconds: float) -> None:
    """How long `gather` and `barrier` wait for the others unless told otherwise."""
    global _patience
    _patience = seconds


def gather(name: str, value: Any, timeout: float | None = None) -> list[Any]:
    """Every process's JSON `value`, in their order. All must call this equally often under the same name.

    Raises `RunFailed` naming those that did not call within `timeout` seconds (default: that of `be_patient`).
    """
    if count() == 1:
        return [value]
    timeout = _patience if timeout is None else timeout
    call = _next_call(name)
    store().key_value_set(f"derta/{name}/{call}/{index()}", json.dumps(value))
    keys = [f"derta/{name}/{call}/{process}" for process in range(count())]
    deadline = time.monotonic() + timeout
    while True:
        found = dict(store().key_value_dir_get(f"derta/{name}/{call}/"))
        missing = [process for process, key in enumerate(keys) if key not in found]
        if not missing:
            break
        if _wait_for(keys[missing[0]], deadline) is None:
            raise RunFailed(
                f"process {', '.join(map(str, missing))} of {count()} did not come to “{name}” in {timeout:g} s"
            )
    # all are here, so all have read what was said the last time
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        store().key_value_delete(f"derta/{name}/{call - 1}/{index()}")
    return [json.loads(found[key]) for key in keys]


def barrier(name: str, timeout: float | None = None) -> None:
    """Return when all processes are here. Raises `RunFailed` as `gather` does."""
    gather(name, None, timeout)


def first_does(name: str, work: Callable[[], None], timeout: float = 6 * 3600.0) -> None:
    """Process 0 does the work, the others wait for it. Its errors are the others' too: the watchdog ends them."""
    if index() == 0:
        work()
    if count() > 1:
        place = f"derta/{name}/{_next_call(name)}"
        if index() == 0:
            store().key_value_set(place, "done")
        elif _wait_for(place, time.monotonic() + timeout) is None:
            raise RunFailed(f"process 0 was not done with “{name}” in {timeout:g} s")


def store() -> Any:
    """The key-value store of the coordination service."""
    return distributed.global_state.client


def _next_call(name: str) -> int:
    with _lock:
        _calls[name] += 1
        return _calls[name]


def _wait_for(key: str, deadline: float) -> str | None:
    """The value of a key, or None if nobody has set it by then; looked at once at least."""
    while True:
        left = max(0.001, deadline - time.monotonic())
        try:
            return store().blocking_key_value_get(key, round(1000 * min(left, 5.0)))
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
        if time.monotonic() >= deadline:
            return None
