"""The memory of a program, which XLA:TPU knows seconds into its compilation, and a minute or more before its time."""

import contextlib
import re
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from derta_jax.training.compiler import Options

Tell = Callable[[float], None]
"""Told bytes of a chip."""

HBM = re.compile(r"\(color=0\)\s+Total bytes: (\d+)")
"""In libtpu's report, which is written at once: space 0 is HBM, and its total is all that is ever put there."""

SECONDS = 0.1
"""Between two looks for the report."""


@contextlib.contextmanager
def memory_seen(tell: Tell) -> Iterator[Options]:
    """Compiler options under which one compilation reports its memory; `tell` is told all that it puts on a chip.

    That is once, on a thread of its own, and before the context is left. Of compilers that report nothing, or something
    else, it is told nothing.
    """
    finished = threading.Event()
    with tempfile.TemporaryDirectory(prefix="derta-plan-") as directory:

        def reported() -> float | None:
            texts = (report.read_text(encoding="utf-8") for report in Path(directory).glob("*memory-usage-report.txt"))
            return next((float(found[1]) for text in texts if (found := HBM.search(text))), None)

        def watch() -> None:
            size, over = None, False
            while size is None and not over:
                over = finished.wait(SECONDS)
                size = reported()
            if size is not None:
                tell(size)

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            yield {"xla_dump_to": directory}
        finally:
            finished.set()
            watcher.join()
