"""What the command line turns into exit codes: a user's mistake (2), a failed run (1), a stop with all saved (75)."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake that the user can mend. The message is all they see: name the file, the line, the key."""


class RunFailed(Exception):
    """A run cannot go on, and no config key is wrong: a lost machine, a loss that is not a number. Says what to do."""


class StoppedEarly(Exception):
    """Training was stopped by Ctrl-C or preemption after saving; running the same command again resumes it."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'X'?` for the nearest known spelling, or nothing when none is near."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
