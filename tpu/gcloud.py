"""Running `gcloud`: what it prints, what its failures mean, and showing instead of running (`--dry-run`)."""

import json
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable
from typing import Any

from derta_jax.errors import RunFailed, UserError

Say = Callable[[str], None]

ABSENT = ("NOT_FOUND", "not found", "matched no objects", "One or more URLs matched no objects")
"""What `gcloud` says of what is not there."""


TRANSIENT = re.compile(
    r"UNAVAILABLE|DEADLINE_EXCEEDED|INTERNAL|RESOURCE_EXHAUSTED: Quota exceeded for quota metric|timed? ?out|"
    r"[Cc]onnection|name resolution|ServerNotFound|SSL|HTTPError (429|5\d\d)|problem refreshing"
)
"""What `gcloud` says where asking again may help."""

PATIENCE = 20
"""How often to ask again, between looks."""


class Absent(RunFailed):
    """What was asked for does not exist."""


class CannotLook(RunFailed):
    """The cloud cannot be asked how things are; they may be well."""


def shown(words: tuple[str, ...], stdin: str | None = None) -> str:
    """A command line as one would type it, with what it reads."""
    line = shlex.join(("gcloud", *words))
    return line if stdin is None else f"{line} <<'END'\n{stdin.rstrip()}\nEND"


class Gcloud:
    """Runs command lines, or says them where `dry_run`: then nothing is run, not even questions."""

    def __init__(self, say: Say, dry_run: bool = False, every: float = 30.0) -> None:
        self.say = say
        self.dry_run = dry_run
        self.every = every
        if not dry_run and shutil.which("gcloud") is None:
            raise UserError("gcloud is not on PATH: install the Google Cloud CLI, then `gcloud auth login`")

    def __call__(self, words: tuple[str, ...], stdin: str | None = None) -> str:
        """What the command prints. Raises `RunFailed` with what `gcloud` says, `Absent` of what does not exist."""
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
        text = self._look(words)
        return json.loads(text) if text else None

    def text(self, words: tuple[str, ...]) -> str:
        """What the objects hold; nothing where there are none."""
        return self._look(words) or ""

    def _look(self, words: tuple[str, ...]) -> str | None:
        """What the command prints, None for what does not exist. A network that is away for a while is waited for."""
        asked = 0
        while True:
            try:
                return self(words)
            except Absent:
                return None
            except RunFailed as error:
                asked += 1
                if not TRANSIENT.search(str(error)):
                    raise
                if asked == PATIENCE:
                    raise CannotLook(str(error)) from error
                if asked == 1:
                    self.say(f"the cloud does not answer, asking again: {str(error).splitlines()[-1]}")
                time.sleep(self.every)
