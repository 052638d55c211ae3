"""What a terminal shows of work that cannot tell how far it is, above all of the compiler's."""

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn


@contextlib.contextmanager
def waiting(console: Console, text: str = "") -> Iterator[Callable[[str], None]]:
    """A text and the time since it began, gone at the end; what comes back changes the text. Only on a terminal."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(text)
        yield lambda text: bar.update(task, description=text)
