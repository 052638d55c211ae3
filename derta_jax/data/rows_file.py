"""The tokenised rows of a run as one file: a line with a digest of all the rest, a line of JSON, then flat arrays.

A file that is not whole, or not what was asked for, is a `DamagedRows`, never rows.
"""

import hashlib
import itertools
import json
import os
from typing import Any

import numpy as np
from etils import epath

from derta_jax.data.pipeline import TrainingRows
from derta_jax.data.tokenise import TokenRow
from derta_jax.interop.tensor_files import as_os_error

MAGIC = b"derta rows 2 "
"""Counts up when the format changes."""

FIRST_LINE = 128
"""Bytes of it, the line's end included."""

NO_PREFIX = -1


class DamagedRows(Exception):
    """Why a file holds no rows that can be trusted, in a few words."""


def write_rows(path: epath.Path, data: TrainingRows, key: str) -> None:
    """Write `data` under another name, then rename: at `path` there is nothing, or all of it. Raises `OSError`.

    `key` says what the rows were made from; `read_rows` asks for it.
    """
    rows = [*data.rows, *data.unlabelled]
    recipes = sorted({row.recipe for row in rows})
    streams = sorted({row.stream for row in rows})
    prefix_words = [NO_PREFIX if row.prefix_words is None else row.prefix_words for row in rows]
    # numbers of four bytes first, so that all lie at multiples of four
    arrays = {
        "lengths": np.array([len(row) for row in rows], np.int32),
        "recipes": np.array([recipes.index(row.recipe) for row in rows], np.int32),
        "prefix_words": np.array(prefix_words, np.int32),
        "token_ids": np.concatenate([np.empty(0, np.int32), *(row.token_ids for row in rows)]),
        "regions": np.concatenate([np.empty(0, np.uint8), *(row.regions for row in rows)]),
        "streams": np.array([streams.index(row.stream) for row in rows], np.uint8),
        "truncated": np.array([row.truncated for row in rows], bool),
    }
    header = {
        "key": key,
        "content_hash": data.content_hash,
        "counts": data.counts,
        "kept": len(data.rows),
        "recipes": recipes,
        "streams": streams,
        "pairs": {number: row.pair for number, row in enumerate(rows) if row.pair is not None},
        "ids": [row.id for row in rows],
        "arrays": {name: [array.dtype.str, len(array)] for name, array in arrays.items()},
    }
    text = json.dumps(header).encode()
    head = text + b" " * (-(len(text) + 1) % 4) + b"\n"
    buffers: list[bytes | memoryview] = [head, *(array.view(np.uint8).data for array in arrays.values())]
    digest = hashlib.sha256()
    for buffer in buffers:
        digest.update(buffer)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    with as_os_error():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("wb") as file:
                for buffer in (_first_line(digest.hexdigest()), *buffers):
                    file.write(buffer)
            partial.replace(path)
        except OSError:
            partial.unlink(missing_ok=True)
            raise


def read_rows(path: epath.Path, key: str) -> TrainingRows:
    """What `write_rows` wrote under the same key; the rows' arrays are read-only views of the file's bytes.

    Raises `DamagedRows`, `FileNotFoundError` or another `OSError`.
    """
    with as_os_error():
        content = path.read_bytes()
    if content[:FIRST_LINE] != _first_line(hashlib.sha256(memoryview(content)[FIRST_LINE:]).hexdigest()):
        raise DamagedRows("it is cut off, or its bytes are not those that were written")
    end = content.index(b"\n", FIRST_LINE) + 1
    header: dict[str, Any] = json.loads(content[FIRST_LINE:end])
    if header["key"] != key:
        raise DamagedRows("its rows were made from something else")
    arrays: dict[str, np.ndarray] = {}
    start = end
    for name, (dtype, count) in header["arrays"].items():
        arrays[name] = np.frombuffer(content, dtype, count, start)
        start += arrays[name].nbytes
    bounds = itertools.pairwise([0, *np.cumsum(arrays["lengths"]).tolist()])
    columns = (arrays[name].tolist() for name in ("recipes", "streams", "prefix_words", "truncated"))
    rows = [
        TokenRow(
            id=id,
            recipe=header["recipes"][recipe],
            token_ids=arrays["token_ids"][begin:end],
            regions=arrays["regions"][begin:end],
            stream=header["streams"][stream],
            prefix_words=None if prefix_words == NO_PREFIX else prefix_words,
            truncated=truncated,
            pair=header["pairs"].get(str(number)),
        )
        for number, (id, (begin, end), recipe, stream, prefix_words, truncated) in enumerate(
            zip(header["ids"], bounds, *columns, strict=True)
        )
    ]
    kept = header["kept"]
    return TrainingRows(rows[:kept], rows[kept:], header["content_hash"], header["counts"])


def _first_line(digest: str) -> bytes:
    return (MAGIC + digest.encode()).ljust(FIRST_LINE - 1) + b"\n"
