"""One process of a pod watches the others: whatever ends one ends all, with the first error printed by each."""

import contextlib
import ctypes
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from typing import Any

import jax

from derta_jax.errors import RunFailed, UserError
from derta_jax.training.pod.processes import barrier, count, index, store

POLL_SECONDS = 1.0
SETTLE_SECONDS = 3 * POLL_SECONDS
"""How long process 0, where the others read why, stays after a failure."""

OWN_ERRORS = ("RESOURCE_EXHAUSTED", "INVALID_ARGUMENT", "UNIMPLEMENTED")
"""Errors of JAX that begin in this process; the others may come from one that died."""

STOPPING = "all processes stop; the same command resumes"

_kept: list[Any] = []


class Watchdog(threading.Thread):
    """Tells the others that this process lives, and ends it when one of them failed or fell silent."""

    def __init__(self, heartbeat_timeout: float):
        super().__init__(name="derta-watchdog", daemon=True)
        self.heartbeat_timeout = heartbeat_timeout
        self.stopped = threading.Event()
        self.answered = time.monotonic()

    def run(self) -> None:
        threading.Thread(target=self._watch_first, name="derta-watchdog-of-0", daemon=True).start()
        last_seen = dict.fromkeys(range(count()), ("", time.monotonic()))
        beat = 0
        while not self.stopped.wait(POLL_SECONDS):
            beat += 1
            try:
                store().key_value_set(f"derta/alive/{index()}", str(beat), allow_overwrite=True)
                beats = dict(store().key_value_dir_get("derta/alive/"))
                failure = dict(store().key_value_dir_get("derta/failure/"))
            except jax.errors.JaxRuntimeError:
                self._end(1, _gone())
                return
            self.answered = now = time.monotonic()
            if failure:
                self._end(*json.loads(failure["derta/failure/first"]))
            for process, (before, since) in last_seen.items():
                beats_now = beats.get(f"derta/alive/{process}", "")
                if beats_now != before:
                    last_seen[process] = (beats_now, now)
                elif now - since > self.heartbeat_timeout and not self.stopped.is_set():
                    silent = f"process {process} has not been heard of for {now - since:.0f} s: it died, or its network"
                    self._publish(1, silent)
                    self._end(1, silent)

    def report(self, error: BaseException) -> None:
        """Tell the others why this process ends; process 0 stays until they have read it."""
        lines = "".join(traceback.format_exception_only(error)).strip()
        told = isinstance(error, UserError | RunFailed)
        if not told and _may_be_of_another(error):
            print(f"derta: {lines}\nderta: waiting for word of the other processes", file=sys.stderr, flush=True)
            time.sleep(self.heartbeat_timeout + 2 * POLL_SECONDS)
        self.stop()
        failure = f"process {index()} ({socket.gethostname()}) failed: {error if told else lines}"
        first = self._publish(2 if isinstance(error, UserError) else 1, failure)
        if first is not None and str(error) not in json.loads(first)[1]:
            print(f"derta: {json.loads(first)[1]}", file=sys.stderr, flush=True)
        if index() == 0:
            time.sleep(SETTLE_SECONDS)

    def part(self) -> None:
        """Leave together with the others: all are done."""
        try:
            barrier("the end")
        except BaseException as error:
            self.report(error)
            raise
        self.stop()
        jax.distributed.shutdown()

    def stop(self) -> None:
        self.stopped.set()
        self.join(SETTLE_SECONDS)

    def _watch_first(self) -> None:
        """Questions to a machine that vanished do not come back: count the seconds since the last answer."""
        while not self.stopped.wait(POLL_SECONDS):
            if time.monotonic() - self.answered > self.heartbeat_timeout:
                self._end(1, _gone())

    def _publish(self, code: int, failure: str) -> str | None:
        """The first failure wins; returns the one that was there before, if there was."""
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            try:
                store().key_value_set("derta/failure/first", json.dumps([code, failure]))
            except jax.errors.JaxRuntimeError:
                return store().key_value_try_get("derta/failure/first")
        return None

    def _end(self, code: int, failure: str) -> None:
        if self.stopped.is_set():
            return
        print(f"\nderta: {failure}\nderta: {STOPPING}", file=sys.stderr, flush=True)
        if index() == 0:
            time.sleep(SETTLE_SECONDS)
        os._exit(code)


def explain_abort(address: str) -> None:
    """When process 0 dies, JAX aborts the others within milliseconds: have them say so, and exit with 1."""
    host, _, port = address.rpartition(":")

    @ctypes.CFUNCTYPE(None, ctypes.c_int)
    def on_abort(_: int) -> None:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=2.0).close()
        except OSError:
            os.write(2, f"\nderta: {_gone()}\nderta: {STOPPING}\n".encode())
            os._exit(1)

    _kept.append(on_abort)
    # Python's own handlers run in the main thread, after the abort
    ctypes.CDLL(None).signal(signal.SIGABRT.value, on_abort)


def _gone() -> str:
    return "process 0, where the others meet, is gone: it died, or its network; its own output may say why"


def _may_be_of_another(error: BaseException | None) -> bool:
    """Whether an error may come from a process that died: a collective or a meeting that broke off."""
    while error is not None:
        if isinstance(error, jax.errors.JaxRuntimeError):
            return not any(kind in str(error) for kind in OWN_ERRORS)
        error = error.__cause__ or error.__context__
    return False
