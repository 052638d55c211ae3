"""Contenders take turns, each in a process of its own: the same rows step by step, timed from outside the first one."""

import contextlib
import importlib.util
import multiprocessing
import os
import platform
import resource
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from importlib import metadata
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from derta_jax.benchmark.config import WARM_UP, Bench
from derta_jax.benchmark.work import Work, make_work
from derta_jax.errors import RunFailed

TOLERANCES = {"float32": 1e-4, "bfloat16": 3e-2}
"""How far losses may be apart, relative to the first contender's."""
PRODUCTS = 5
PRODUCT_SIDES = 2048
"""Of the matrices whose product is a processor's peak; an accelerator's takes a fourfold of them."""
SHARED_DEVICE = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "PYTORCH_ALLOC_CONF": "expandable_segments:True"}
"""In the environment of contenders, which lie in an accelerator's memory side by side: each takes what it needs."""
LIBRARIES = ("jax", "jaxlib", "torch", "transformers")
READY, END, LEAVE = "ready", "end", "leave"
PATIENCE = 5.0
"""Seconds for a process to leave by itself."""


class Contender(Protocol):
    """One way to train.

    `accelerator` names the device unless it is the processor; `product(sides)` multiplies two square matrices, for the
    machine's peak, and waits.
    """

    work: Work
    accelerator: str | None

    def padded_tokens(self, number: int) -> int: ...

    def step(self, number: int) -> float: ...

    def product(self, sides: int) -> Callable[[], Any]: ...

    def device_peak_bytes(self) -> int | None: ...


def make_contender(name: str, work: Work) -> Contender:
    """By its name; imports no more than it needs."""
    if packing := {"padded": "none", "packed": "rows"}.get(name):
        from derta_jax.benchmark.ours import Ours

        return Ours(work, packing)
    from derta_jax.benchmark.torch_steps import Best, Original

    return {"original": Original, "torch": Best}[name](work)


def run_bench(bench: Bench, console: Console) -> dict[str, Any]:
    """Race them; returns DESIGN's object. Raises `UserError`, and `RunFailed` where one fails or learns otherwise."""
    with tempfile.TemporaryDirectory() as directory:
        work: Work = aside(_prepare, bench, Path(directory), console.quiet)
        with contextlib.ExitStack() as stack:
            racing: dict[str, _Process] = {name: stack.enter_context(_Process(name, work)) for name in bench.contenders}
            bar = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
            progress = stack.enter_context(
                Progress(*bar, TimeElapsedColumn(), TimeRemainingColumn(), console=console, transient=True)
            )
            task = progress.add_task("", total=len(racing) * (bench.steps + 1))
            ready: dict[str, tuple[float, str | None]] = {}
            steps: dict[str, list[tuple[float, float]]] = {name: [] for name in racing}
            for name, process in racing.items():
                progress.update(task, description=f"{name}: getting ready")
                ready[name] = process.ask(READY)
                progress.advance(task)
            for number in range(bench.steps):
                for name, process in racing.items():
                    progress.update(task, description=f"{name}: step {number}")
                    steps[name].append(process.ask(number))
                    progress.advance(task)
            ends = {name: process.ask(END) for name, process in racing.items()}
        return _results(work, ready, steps, ends)


def aside(function: Callable[..., Any], *arguments: Any) -> Any:
    """Its result, from a process of its own: with that ends what it takes of an accelerator's memory.

    Raises what it raises, and `RunFailed` where the process is gone.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        try:
            return process.submit(function, *arguments).result()
        except BrokenProcessPool as error:
            raise RunFailed("the process that makes model and rows is gone; had it enough memory?") from error


def _prepare(bench: Bench, directory: Path, quiet: bool) -> Work:
    return make_work(bench, directory, Console(quiet=quiet))


def _results(
    work: Work, ready: dict[str, tuple[float, str | None]], steps: dict[str, list[Any]], ends: dict[str, Any]
) -> dict[str, Any]:
    bench, timed = work.bench, range(WARM_UP, work.bench.steps)
    setting = bench.model_dump(mode="json", exclude={"contenders", "checkpoint", "watch", "processes", "held_out"})
    losses = {name: [loss for _, loss in of_one] for name, of_one in steps.items()}
    check_losses(losses, TOLERANCES[bench.train.dtype])
    amounts = [work.amounts(number) for number in range(bench.steps)]
    peaks = {name: flops for name, (flops, _) in ready.items()}
    peak = max(peaks.values())
    contenders = {}
    for name, of_one in steps.items():
        seconds = [of_one[number][0] for number in timed]
        contenders[name] = {
            "step_seconds": spread(seconds),
            "useful_tokens_per_second": spread([amounts[n].useful / of_one[n][0] for n in timed]),
            "labelled_tokens_per_second": spread([amounts[n].labelled / of_one[n][0] for n in timed]),
            "padded_tokens_per_second": spread([ends[name]["padded_tokens"][n] / of_one[n][0] for n in timed]),
            "peak_bytes": ends[name]["peak_bytes"],
            "mfu": spread([amounts[n].flops / of_one[n][0] / peak for n in timed]),
            "loss": losses[name],
        }
    speed = {name: each["useful_tokens_per_second"]["median"] for name, each in contenders.items()}
    return {
        "machine": machine() | {"accelerator": next(iter(ready.values()))[1], "peak_flops": peaks},
        "versions": versions(),
        "setting": setting,
        "contenders": contenders,
        "ratios": {f"{a}/{b}": speed[a] / speed[b] for a in speed for b in speed if a != b},
    }


def check_losses(losses: dict[str, list[float]], tolerance: float) -> None:
    """Raise `RunFailed` where one has not computed what the first has."""
    (first, reference), *others = losses.items()
    for name, found in others:
        for step, (loss, expected) in enumerate(zip(found, reference, strict=True)):
            if not abs(loss - expected) <= tolerance * abs(expected):
                raise RunFailed(f"{name} learns otherwise than {first}: loss {loss} for {expected} in step {step}")


def spread(values: list[float]) -> dict[str, float]:
    """Median, lowest and highest."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def machine() -> dict[str, Any]:
    """What it runs on."""
    return {"processor": _processor(), "cores": len(os.sched_getaffinity(0))}


def versions() -> dict[str, str]:
    """Of the libraries that are raced."""
    return {name: metadata.version(name) for name in LIBRARIES if importlib.util.find_spec(name)}


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor()


class _Process:
    """A contender in its process, which answers one question at a time; it ends with the context."""

    def __init__(self, name: str, work: Work):
        context = multiprocessing.get_context("spawn")
        self.name = name
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, name, work), daemon=True)

    def __enter__(self) -> "_Process":
        self.process.start()
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self.connection.send(LEAVE)
        self.process.join(PATIENCE)
        self.process.terminate()
        self.process.join()

    def ask(self, question: str | int) -> Any:
        """Raises `RunFailed` where the contender fails or is gone."""
        try:
            self.connection.send(question)
            answer = self.connection.recv()
        except (EOFError, OSError) as error:
            raise RunFailed(f"{self.name} is gone; had it enough memory?") from error
        if isinstance(answer, Exception):
            raise answer
        return answer


def _serve(connection: Connection, name: str, work: Work) -> None:
    """READY → FLOP/s of a plain product; a step's number → (seconds, loss); END → its sizes."""
    contender: Contender | None = None
    os.environ.update(SHARED_DEVICE)
    while (question := connection.recv()) != LEAVE:
        try:
            if contender is None:
                contender = make_contender(name, work)
            connection.send(_answer(contender, question))
        except Exception as error:  # any step may fail in any way; unanswered, the other side would wait for ever
            traceback.print_exc()
            connection.send(RunFailed(f"{name}: {error}"))


def _answer(contender: Contender, question: str | int) -> Any:
    if question == READY:
        sides = PRODUCT_SIDES if contender.accelerator is None else 4 * PRODUCT_SIDES
        product = contender.product(sides)
        return 2 * sides**3 / min(_timed(product)[0] for _ in range(PRODUCTS)), contender.accelerator
    if question == END:
        on_device = contender.device_peak_bytes()
        peak = on_device or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        steps = range(contender.work.bench.steps)
        return {"padded_tokens": [contender.padded_tokens(step) for step in steps], "peak_bytes": peak}
    return _timed(lambda: contender.step(int(question)))


def _timed(function: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    result = function()
    return time.perf_counter() - started, result
