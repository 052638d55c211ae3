"""Rows of the world as datasets."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from derta_jax.data.dataset import prepare
from derta_jax.miniature.world import Row


def prepare_rows(kinds: Mapping[str, Sequence[Row]], directory: Path) -> dict[str, Path]:
    """Write rows as JSONL and prepare them, as a user does with theirs."""
    directory.mkdir(parents=True, exist_ok=True)
    prepared = {}
    for name, rows in kinds.items():
        file = directory / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        prepared[name] = directory / name
        prepare([file], prepared[name])
    return prepared
