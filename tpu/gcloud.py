"""Running `gcloud`: what it prints, what its failures mean, and showing instead of running (`--dry-run`)."""

import json
import shlex
import shutil
import subprocess
from collections.abc import Callable
from typing import Any

from derta_jax.errors import RunFailed, UserError

Say = Callable[[str], None]

ABSENT = ("NOT_FOUND", "not found", "matched no objects", "One or more URLs matched no objects")
"""What `gcloud` says of what is not there."""


class Absent(Exception):
    """What was asked for does not exist."""


def shown(words: tuple[str, ...], stdin: str | None = None) -> str:
    """A command line as one would type it, with what it reads."""
    line = shlex.join(("gcloud", *words))
    return line if stdin is None else f"{line} <<'END'\n{stdin.rstrip()}\nEND"


class Gcloud:
    """Runs command lines, or says them where `dry_run`: then nothing is run, not even questions."""

    def __init__(self, say: Say, dry_run: bool = False) -> None:
        self.say = say
        self.dry_run = dry_run
        if not dry_run and shutil.which("gcloud") is None:
            raise UserError("gcloud is not on PATH: install the Google Cloud CLI, then `gcloud auth login`")

    def __call__(self, words: tuple[str, ...], stdin: str | None = None) -> str:
        """What the command prints. Raises `Absent`, or `RunFailed` with what `gcloud` says."""
        if self.dry_run:
            self.say(shown(words, stdin))
            return ""
        done = subprocess.run(("gcloud", *words), input=stdin, capture_output=True, text=True, errors="replace")
        if done.returncode:
            if any(sign in done.stderr for sign in ABSENT):
                raise Absent(done.stderr.strip())
            raise RunFailed(
                f"{shown(words)}\nended with {done.returncode}: {done.stderr.strip() or done.stdout.strip()}"
            )
        return done.stdout

    def attached(self, words: tuple[str, ...]) -> None:
        """Run it with this terminal as its own. Raises `RunFailed`."""
        if self.dry_run:
            self.say(shown(words))
        elif code := subprocess.run(("gcloud", *words)).returncode:
            raise RunFailed(f"{shown(words)}\nended with {code}")

    def json(self, words: tuple[str, ...]) -> dict[str, Any] | None:
        """What the command describes; None where that does not exist, or is not asked for in a dry run."""
        try:
            text = self(words)
        except Absent:
            return None
        return json.loads(text) if text else None

    def text(self, words: tuple[str, ...]) -> str:
        """What the objects hold; nothing where there are none."""
        try:
            return self(words)
        except Absent:
            return ""
