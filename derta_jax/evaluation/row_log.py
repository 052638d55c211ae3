"""Rows on disk as soon as they are made, so that a run that is killed goes on where it was."""

import fcntl
import json
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from derta_jax.errors import UserError


class RowLog:
    """A JSONL file of numbered rows in the order in which they are finished, behind a line of the settings they are of.

    `rows` holds what is there, by number. Opening it again with the same settings goes on; a last line that was cut
    off counts as not written. Raises `UserError` where the settings are others, naming them, or another process writes.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.rows: dict[int, dict[str, Any]] = {}
        self._file: IO[bytes] = path.open("a+b")
        try:
            self._claim(dict(settings))
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> "RowLog":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, number: int, row: dict[str, Any]) -> None:
        """Write one row; what is written survives a kill of this process."""
        self._write({"row": number} | row)
        self.rows[number] = row

    def _claim(self, settings: dict[str, Any]) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{self.path} is being written by another process: wait for it, or stop it") from error
        self._file.seek(0)
        lines = self._file.read().split(b"\n")
        self._file.truncate(sum(len(line) + 1 for line in lines[:-1]))
        if len(lines) == 1:
            self._write({"settings": settings})
            return
        try:
            before = json.loads(lines[0])["settings"]
            found = [json.loads(line) for line in lines[1:-1]]
            self.rows = {entry.pop("row"): entry for entry in found}
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.path} is damaged ({error}): delete it to start over") from error
        if before != settings:
            changed = [
                f"  {name}: {before.get(name)!r} there, {settings.get(name)!r} here"
                for name in dict.fromkeys([*before, *settings])
                if before.get(name) != settings.get(name)
            ]
            raise UserError(
                f"{self.path} was written with other settings:\n" + "\n".join(changed) + "\n"
                "Go on with those settings, choose another --output, or delete that file to start over."
            )

    def _write(self, row: Mapping[str, Any]) -> None:
        line = json.dumps(row, ensure_ascii=False).encode("utf-8") + b"\n"
        try:
            self._file.write(line)
            self._file.flush()
        except OSError as error:
            raise UserError(f"cannot write to {self.path}: {error.strerror}") from error
