"""A spinner with the time, on a terminal and elsewhere."""

import io

from rich.console import Console

from derta_jax.waiting import waiting


def shown(terminal: bool) -> str:
    """All that was written while two texts were shown."""
    file = io.StringIO()
    with waiting(Console(file=file, force_terminal=terminal, width=80), "reading") as show:
        show("compiling small on v5e-4")
    return file.getvalue()


def test_a_terminal_shows_the_text_and_the_time():
    assert "compiling small on v5e-4" in shown(terminal=True)
    assert "0:00:00" in shown(terminal=True)


def test_elsewhere_nothing_is_written():
    assert shown(terminal=False) == ""
