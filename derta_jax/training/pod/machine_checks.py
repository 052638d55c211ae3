"""Checks of the machines of a pod: programs, clocks, devices and what connects them."""

import functools
import glob
import os
import re
import socket
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import hardware_utils  # counts TPU chips without touching them; there is no public way
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from derta_jax.config import RunConfig
from derta_jax.errors import RunFailed
from derta_jax.training.pod import processes
from derta_jax.training.pod.check import Check, Status, differences, readable_size
from derta_jax.versions import versions

CLOCK_WARN, CLOCK_FAIL = 2.0, 60.0
"""Seconds between two clocks; buckets refuse requests signed minutes from now."""
FREE_SHARE = 0.9
"""Of a device's memory, before a run begins."""


def describe_machine(config: RunConfig | None) -> dict[str, Any]:
    """What there is to know before the devices are touched."""
    return {
        "host": socket.gethostname(),
        "versions": versions(),
        "config": _flat(config.model_dump(mode="json")) if config else {},
    }


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys; `train.compilation_cache` may differ from machine to machine."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    flat.pop("train.compilation_cache", None)
    return flat


def check_versions(facts: list[dict[str, Any]]) -> Check:
    """Whether all processes run the same programs."""
    different = list(differences([fact["versions"] for fact in facts]))
    if different:
        return Check("versions", "fail", f"{'; '.join(different)}: install the same on all machines")
    return Check("versions", "ok", ", ".join(f"{name} {version}" for name, version in facts[0]["versions"].items()))


def check_config(configs: list[dict[str, Any]]) -> Check:
    """Whether all processes were given the same keys."""
    different = list(differences(configs))
    if different:
        return Check("config", "fail", f"{'; '.join(different)}: start all with the same config")
    return Check("config", "ok", "the same on all processes")


def check_processes(facts: list[dict[str, Any]]) -> Check:
    """How many there are, and where; those that did not come ended the run before."""
    hosts = list(dict.fromkeys(fact["host"] for fact in facts))
    shown = ", ".join(hosts[:4]) + (f", … {hosts[-1]}" if len(hosts) > 4 else "")
    where = f"{len(hosts)} hosts: {shown}" if len(hosts) > 1 else shown
    return Check("processes", "ok", f"{len(facts)} expected and seen, on {where}")


def check_clocks(timeout: float) -> Check:
    """Clocks that are read between the arrival of the last process at one meeting and its departure from the next."""
    start = time.monotonic()
    processes.barrier("doctor: clocks", timeout)
    times = processes.gather("doctor: clock", time.time(), timeout)
    # of all waiting times the shortest is that of the last to come
    error = min(processes.gather("doctor: clock error", time.monotonic() - start, timeout))
    return judge_clocks(times, error)


def judge_clocks(times: Sequence[float], error: float) -> Check:
    """A verdict on clocks that were read within `error` seconds of each other."""
    apart = max(times) - min(times)
    text = f"within {apart:.2f} s of each other, read within {error:.2f} s"
    if apart - error <= CLOCK_WARN:
        return Check("clocks", "ok", text)
    middle = sorted(times)[len(times) // 2]
    worst = max(range(len(times)), key=lambda process: abs(times[process] - middle))
    text = f"{apart:.1f} s apart, most of all that of process {worst}: let all hosts follow one time server"
    return Check("clocks", "fail" if apart - error > CLOCK_FAIL else "warn", text)


def wait_for_devices() -> None:
    """Have JAX start them. Raises `RunFailed` that says why it cannot."""
    try:
        jax.devices()
    except (RuntimeError, ValueError) as error:
        raise RunFailed(explain_devices(str(error))) from error


def explain_devices(error: str) -> str:
    """Why JAX has no devices, from its own words."""
    if holder := re.search(r"in use by process with pid (\d+)", error):
        return f"another program holds the devices, process {holder[1]}: end it, or wait until it is done"
    if "RESOURCE_EXHAUSTED" in error or "OUT_OF_MEMORY" in error:
        return f"another program holds the devices' memory: end it, or wait until it is done ({error})"
    return f"there are no devices: {error}"


def local_devices() -> dict[str, Any]:
    """This process's devices, and what the machine has that JAX does not use."""
    devices = jax.local_devices()
    return {
        "platform": devices[0].platform,
        "kind": devices[0].device_kind,
        "count": len(devices),
        "all": jax.device_count(),
        "unused": "" if devices[0].platform != "cpu" else _accelerator(),
        "asked": os.environ.get("JAX_PLATFORMS") == "cpu",
    }


def _accelerator() -> str:
    """What this machine has beside its CPU."""
    chips, _ = hardware_utils.num_available_tpu_chips_and_device_id()
    if chips:
        return f"{chips} TPU chips: pip install 'derta-jax[tpu]'"
    gpus = len(glob.glob("/dev/nvidia[0-9]*"))
    return f"{gpus} GPUs: pip install 'derta-jax[gpu]'" if gpus else ""


def check_devices(facts: list[dict[str, Any]]) -> Check:
    """Whether all processes have the same devices, and the best that their machines have."""
    kinds = [{name: fact[name] for name in ("platform", "kind", "count", "all")} for fact in facts]
    if different := list(differences(kinds)):
        return Check("devices", "fail", f"{'; '.join(different)}: all processes need the same devices")
    first = facts[0]
    text = f"{first['all']} × {first['kind']}, {first['count']} on each process"
    if first["all"] != first["count"] * len(facts):
        return Check("devices", "fail", f"{text}: of {len(facts)} processes, JAX joined {first['all']} devices only")
    unused = [(process, fact) for process, fact in enumerate(facts) if fact["unused"]]
    if not unused:
        return Check("devices", "ok", text)
    process, fact = unused[0]
    if fact["asked"]:
        return Check("devices", "warn", f"{text}, as JAX_PLATFORMS=cpu says, though there are {fact['unused']}")
    # a TPU machine costs too much to be used for its CPU; a GPU may be there for something else
    status: Status = "fail" if "TPU" in fact["unused"] else "warn"
    return Check("devices", status, f"{text}, but the machine of process {process} has {fact['unused']}")


def check_collectives() -> Check:
    """A sum over all devices: proves that they reach each other."""
    count = jax.device_count()
    mesh = Mesh(np.array(jax.devices()), ("all",))
    start = time.monotonic()
    ones = jax.make_array_from_callback(
        (count,), NamedSharding(mesh, PartitionSpec("all")), lambda _: np.ones(1, np.float32)
    )
    total = float(np.asarray(_sum(ones, mesh)))
    if total != count:
        return Check("collectives", "fail", f"{count} devices add up {count} ones to {total:g}: one of them is broken")
    return Check("collectives", "ok", f"a sum over {count} devices in {time.monotonic() - start:.2f} s")


@functools.partial(jax.jit, static_argnums=1)
def _sum(ones: jax.Array, mesh: Mesh) -> jax.Array:
    return jax.lax.with_sharding_constraint(jnp.sum(ones), NamedSharding(mesh, PartitionSpec()))


def free_memory() -> tuple[int, int, int] | None:
    """Bytes free, bytes in all and number of the fullest local device; None where devices do not tell."""
    stats = [(device.id, device.memory_stats() or {}) for device in jax.local_devices()]
    known = [
        (stat["bytes_limit"] - stat["bytes_in_use"], stat["bytes_limit"], number)
        for number, stat in stats
        if stat.get("bytes_limit")
    ]
    return min(known, default=None)


def check_memory(facts: list[list[int] | None]) -> list[Check]:
    """Whether the fullest device is free; nothing where devices do not tell."""
    known = [(*fact, process) for process, fact in enumerate(facts) if fact is not None]
    if not known:
        return []
    free, limit, device, process = min(known)
    text = f"{readable_size(free)} of {readable_size(limit)} free"
    if free >= FREE_SHARE * limit:
        return [Check("memory", "ok", f"{text} on each device")]
    text += f" on device {device} of process {process}: look which program holds the rest"
    return [Check("memory", "warn", text)]
