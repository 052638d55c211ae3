"""`derta doctor`: in seconds, everything about machines, mesh and storage that would stop a run after minutes.

Each process looks at itself, the facts are exchanged, and all come to the same verdict.
"""

import time
from collections.abc import Sequence

import jax
from rich.console import Console
from rich.table import Table

from derta_jax.config import Processes, RunConfig
from derta_jax.errors import UserError
from derta_jax.training.pod import processes
from derta_jax.training.pod.check import Check, in_time
from derta_jax.training.pod.machine_checks import (
    check_clocks,
    check_collectives,
    check_config,
    check_devices,
    check_memory,
    check_processes,
    check_versions,
    describe_machine,
    free_memory,
    local_devices,
    wait_for_devices,
)
from derta_jax.training.pod.storage_checks import check_disk, check_model, check_output, free_space


def doctor(config: RunConfig | None, console: Console) -> list[Check]:
    """Check and show everything; without a config the machines alone. Raises `UserError` as `check_start` does."""
    checks = run_checks(config, console)
    show(checks, console, verbose=True)
    _raise_failures(checks)
    return checks


def check_start(config: RunConfig, console: Console) -> list[Check]:
    """The same before training: one line, and the warnings. Raises one `UserError` that lists all that failed."""
    start = time.monotonic()
    checks = run_checks(config, console)
    _raise_failures(checks)
    show(checks, console, verbose=False, seconds=time.monotonic() - start)
    return checks


def run_checks(config: RunConfig | None, console: Console) -> list[Check]:
    """All checks, the same list on every process; all processes must call it.

    It ends early when their programs or configs differ: what they do next might not match. Raises `RunFailed` when the
    devices cannot be had or do not answer: nothing else can be said then.
    """
    timeout = (config.processes if config else Processes()).start_timeout
    with console.status("checking the machines"):
        facts = processes.gather("doctor: machines", describe_machine(config), timeout)
        checks = [check_versions(facts), check_processes(facts)]
        if len(facts) > 1:
            checks.append(check_config([fact["config"] for fact in facts]))
        if any(check.status == "fail" for check in checks):
            return checks
        if len(facts) > 1:
            checks.append(check_clocks(timeout))
        in_time(
            wait_for_devices,
            timeout,
            f"the devices were not there within {timeout:g} s: those of a pod wait for each other; did you use "
            "--worker=all? If all processes have started, the output of another may say more",
        )
        checks.append(check_devices(processes.gather("doctor: devices", local_devices(), timeout)))
        if checks[-1].status != "fail":
            checks.append(
                in_time(
                    check_collectives,
                    timeout,
                    f"the devices did not add up {jax.device_count()} ones within {timeout:g} s: the network between "
                    "the hosts does not let them through, or one of the devices is broken",
                )
            )
        checks += check_memory(processes.gather("doctor: memory", free_memory(), timeout))
        if config is not None:
            fitting, checkpoint = check_model(config)
            checks += [*fitting, check_output(config.train.output, timeout)]
            space = processes.gather("doctor: disk", free_space(config.train.output), timeout)
            checks.append(check_disk(config, checkpoint, space))
    return checks


def show(checks: Sequence[Check], console: Console, verbose: bool, seconds: float | None = None) -> None:
    """A table of all checks; or one line, and another for each that is not well."""
    if verbose:
        colours = {"ok": "green", "warn": "yellow", "fail": "red"}
        table = Table(box=None, show_header=False)
        for check in checks:
            table.add_row(check.name, f"[{colours[check.status]}]{check.status}", check.text.replace("[", r"\["))
        console.print(table, highlight=False)
        return
    well = sum(check.status == "ok" for check in checks)
    duration = "" if seconds is None else f" in {seconds:.1f} s"
    console.print(f"checks    {well} of {len(checks)} ok{duration}", highlight=False)
    for check in checks:
        if check.status != "ok":
            line = f"{check.status:<10}{check.name}: {check.text}"
            console.print(line, highlight=False, markup=False, soft_wrap=True)


def _raise_failures(checks: Sequence[Check]) -> None:
    failures = [f"  {check.name}: {check.text}" for check in checks if check.status == "fail"]
    if failures:
        raise UserError(f"{len(failures)} of {len(checks)} checks failed:\n" + "\n".join(failures))
