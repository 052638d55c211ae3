"""A trace of a few steps for XProf: what host and devices did, microsecond by microsecond."""

import contextlib
from typing import Any

import jax
from rich.console import Console

from derta_jax.training.pod import processes
from derta_jax.training.watching.mirror import Mirror

WARM_UP = 2
"""Steps before the traced ones: they compile, and fill the input's buffers."""

FOLDER = "profile"


class Profile:
    """Traces `count` steps from step `first` on into `profile/` of the run directory; none where count is 0.

    Process 0 traces itself and its own devices, which do what all others do. The trace ends as soon as a step after
    the traced ones has begun and been finished, so that the work of all traced ones is in it, whether or not the loop
    dispatches a step ahead.
    """

    def __init__(self, output: Any, first: int, count: int, console: Console):
        self.output, self.first, self.console = output, first, console
        self.count = count if processes.index() == 0 else 0
        self._mirror: Mirror | None = None

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def step(self, number: int) -> contextlib.AbstractContextManager[Any]:
        """Around the dispatch of one step, and whatever else the loop does for it."""
        if number == self.first and self.count:
            self._start()
        elif number > self.first + self.count:
            self._stop()
        if self._mirror is None:
            return contextlib.nullcontext()
        return jax.profiler.StepTraceAnnotation("train", step_num=number)

    def _start(self) -> None:
        self._mirror = Mirror(self.output)
        options = jax.profiler.ProfileOptions()
        # Python's own calls would fill the trace, and slow down what is measured
        options.python_tracer_level = 0
        jax.profiler.start_trace(self._mirror.local / FOLDER, profiler_options=options)

    def _stop(self) -> None:
        if self._mirror is None:
            return
        mirror, self._mirror = self._mirror, None
        jax.profiler.stop_trace()
        mirror.push(FOLDER)
        mirror.remove()
        directory = mirror.output / FOLDER
        self.console.print(
            f"profile   steps {self.first} to {self.first + self.count - 1} are in {directory}; to see them: "
            f"pip install xprof; xprof --logdir {directory} --port 8791",
            highlight=False,
            soft_wrap=True,
        )
