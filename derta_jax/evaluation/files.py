"""Files that are there as a whole or not at all."""

import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from derta_jax.errors import UserError


def write_whole(text: str, path: str | os.PathLike[str]) -> None:
    """Whoever reads `path` sees the old file or the new one, never a part. Half characters become question marks."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8", errors="replace")
        partial.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def write_rows(rows: Sequence[Mapping[str, Any]], path: str | os.PathLike[str]) -> None:
    """JSONL, an object a line."""
    write_whole("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), path)


def make_directory(path: Path) -> None:
    """Before the work, not after it, when nothing can be written."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {path}: {error.strerror}") from error
