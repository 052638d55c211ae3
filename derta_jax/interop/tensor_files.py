"""Safetensors files read and written in place: 8 bytes of header length, a JSON header, the bytes of the tensors.

Reads go straight into the caller's buffer, from disk or through fsspec from a URL; no file is mapped, because mapped
pages count as memory of the process. A writer holds one block of one tensor.
"""

import contextlib
import json
import math
import os
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self

import ml_dtypes
import numpy as np

FLOATS: dict[str, Any] = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "F64": np.float64}
"""The dtypes of weights."""

DTYPE_BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8}
DTYPE_BITS |= {"F8_E5M2FNUZ": 8, "BOOL": 8, "U8": 8, "I8": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32}
DTYPE_BITS |= {"U32": 32, "F32": 32, "C64": 64, "F64": 64, "I64": 64, "U64": 64}

MAX_HEADER_BYTES = 100_000_000
REQUEST_BYTES = 8 << 20
SHORTEST_SEGMENT = 4096
"""Bytes of a part of a row that is read by itself: with less than a page, disks would read all of the row anyway."""
PANEL = 128
"""Rows transposed together: numpy is several times faster when what it reads and what it writes both fit the cache."""


class BrokenFile(Exception):
    """Why a file is not a whole safetensors file, in a few words."""


class TensorFile(Protocol):
    """An open file that several threads may read."""

    path: str | Path
    size: int
    reads_segments: bool

    def read_into(self, into: np.ndarray, offset: int) -> None:
        """Fill the bytes of `into`, or raise `OSError`."""

    def close(self) -> None: ...


class LocalFile:
    """A file on disk."""

    reads_segments = True

    def __init__(self, path: str | Path):
        self.path: str | Path = path
        self.descriptor = os.open(path, os.O_RDONLY)
        self.size = os.fstat(self.descriptor).st_size

    def read_into(self, into: np.ndarray, offset: int) -> None:
        done = os.preadv(self.descriptor, [into.data], offset)
        while done < len(into):
            read = os.preadv(self.descriptor, [into[done:].data], offset + done)
            if not read:
                raise OSError(f"{self.path} ends after {offset + done} bytes")
            done += read

    def close(self) -> None:
        os.close(self.descriptor)


class RemoteFile:
    """A file behind a URL, read by ranges."""

    reads_segments = False

    def __init__(self, url: str):
        self.path: str | Path = url
        self.system, self.name = file_system(url)
        with as_os_error():
            self.size = int(self.system.size(self.name))

    def read_into(self, into: np.ndarray, offset: int) -> None:
        with as_os_error():
            data = self.system.cat_file(self.name, start=offset, end=offset + len(into))
        if len(data) != len(into):
            raise OSError(f"{self.path} ends after {offset + len(data)} bytes")
        into[:] = np.frombuffer(data, np.uint8)

    def close(self) -> None:
        """Nothing is kept open."""


def open_tensor_file(path: str | Path) -> TensorFile:
    """Open a local file or a URL; raises `OSError` (`FileNotFoundError` where there is none)."""
    return RemoteFile(str(path)) if "://" in str(path) else LocalFile(path)


def file_system(url: str) -> tuple[Any, str]:
    """fsspec's file system of a URL, and the path in it; raises `OSError`."""
    import fsspec  # here, because most weights are on disk

    with as_os_error():
        return fsspec.core.url_to_fs(url)


@contextlib.contextmanager
def as_os_error() -> Iterator[None]:
    """gcsfs, s3fs and the like raise exceptions of their own, which share no class but `Exception`."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:  # storage libraries share no class of their own
        raise OSError(f"{type(error).__name__}: {error}") from error


class StoredTensor(NamedTuple):
    """Where a tensor lies: `start` is its first byte in the file."""

    file: str | Path
    dtype: str
    shape: tuple[int, ...]
    start: int


def read_header(file: TensorFile) -> dict[str, StoredTensor]:
    """The tensors of a file by name, from a header that is not trusted. Raises `BrokenFile`, or `OSError`."""
    if file.size < 8:
        raise BrokenFile(f"it is {file.size} bytes long")
    prefix = np.empty(8, np.uint8)
    file.read_into(prefix, 0)
    (length,) = struct.unpack("<Q", prefix.tobytes())
    if length > min(file.size - 8, MAX_HEADER_BYTES):
        raise BrokenFile(f"it says that its header has {length:,} bytes, and is {file.size:,} bytes long")
    text = np.empty(length, np.uint8)
    file.read_into(text, 8)
    try:
        header = json.loads(text.tobytes(), object_pairs_hook=_without_twins)
    except (ValueError, RecursionError) as error:
        raise BrokenFile(f"its header is not valid JSON: {error}") from error
    if not isinstance(header, dict):
        raise BrokenFile("its header is not a JSON object")
    header.pop("__metadata__", None)
    tensors = {}
    end = 0
    for name, (begin, dtype, shape, size) in sorted(_entries(header), key=lambda entry: entry[1][0]):
        if begin != end:
            raise BrokenFile(f"{name} starts at byte {begin:,} of the data, the tensor before it ends at {end:,}")
        end += size
        tensors[name] = StoredTensor(file.path, dtype, shape, 8 + length + begin)
    if file.size != 8 + length + end:
        raise BrokenFile(f"it is {file.size:,} bytes long, its header asks for {8 + length + end:,}")
    return tensors


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name is there twice")
    return result


def _entries(header: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, str, tuple[int, ...], int]]]:
    """Name, and first byte, dtype, shape and bytes of each entry, once they agree with each other."""

    def is_sizes(value: Any) -> bool:
        return isinstance(value, list) and all(type(size) is int and size >= 0 for size in value)

    for name, entry in header.items():
        if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
            raise BrokenFile(f"the entry of {name} is not dtype, shape and data_offsets")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
            raise BrokenFile(f"{name} has the unknown dtype {dtype!r}")
        if not is_sizes(shape) or not is_sizes(offsets) or len(offsets) != 2:
            raise BrokenFile(f"the shape or the data_offsets of {name} are not lists of sizes")
        size, spare = divmod(math.prod(shape) * DTYPE_BITS[dtype], 8)
        if spare or offsets[1] - offsets[0] != size:
            raise BrokenFile(f"{name} {shape} of {dtype} does not fill the bytes {offsets[0]:,} to {offsets[1]:,}")
        yield name, (offsets[0], dtype, tuple(shape), size)


def row_blocks(file: TensorFile, tensor: StoredTensor, rows: slice, columns: slice) -> Iterator[slice]:
    """Rows of a matrix in blocks that are read at once, of about `REQUEST_BYTES`."""
    item, row_bytes = _sizes(tensor)
    width = (columns.stop - columns.start) * item
    step = max(1, REQUEST_BYTES // (width if _in_segments(file, width, row_bytes) else row_bytes))
    for top in range(rows.start, rows.stop, step):
        yield slice(top, min(top + step, rows.stop))


def read_box(file: TensorFile, tensor: StoredTensor, rows: slice, columns: slice, into: np.ndarray) -> None:
    """Fill `into` [rows, columns] with that part of a matrix; a vector is a matrix of one row.

    `into` has the tensor's dtype and contiguous rows. On disk only the columns asked for are read, elsewhere, and where
    they are few, whole rows.
    """
    item, row_bytes = _sizes(tensor)
    start, left = tensor.start + rows.start * row_bytes, columns.start * item
    target = into.view(np.uint8)
    width = target.shape[1]
    if width == row_bytes and target.flags.c_contiguous:
        file.read_into(target.reshape(-1), start)
    elif _in_segments(file, width, row_bytes):
        for number, row in enumerate(target):
            file.read_into(row, start + number * row_bytes + left)
    else:
        whole = np.empty((len(target), row_bytes), np.uint8)
        file.read_into(whole.reshape(-1), start)
        target[:] = whole[:, left : left + width]


def _sizes(tensor: StoredTensor) -> tuple[int, int]:
    """Bytes of a number and of a row."""
    item = DTYPE_BITS[tensor.dtype] // 8
    return item, tensor.shape[-1] * item


def _in_segments(file: TensorFile, width: int, row_bytes: int) -> bool:
    return file.reads_segments and SHORTEST_SEGMENT <= width < row_bytes


def copy_matrix(source: np.ndarray, into: np.ndarray) -> None:
    """`into[:] = source`, with its cast, as quick as that should be where one of them is transposed."""
    if into.strides[1] != into.itemsize:
        source, into = source.T, into.T
    if source.strides[1] == source.itemsize:
        into[:] = source
        return
    if source.dtype == into.dtype:  # numpy copies integers faster than what it does not know
        bits = f"u{source.itemsize}"
        source, into = source.view(bits), into.view(bits)
    for top in range(0, len(into), PANEL):
        into[top : top + PANEL] = np.ascontiguousarray(source[top : top + PANEL].T).T


class TensorWriter:
    """Write a file as the safetensors library lays it out: names, shapes and dtype first, then one tensor at a time."""

    def __init__(self, path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: np.dtype):
        self.path, self.dtype = path, np.dtype(dtype)
        self.left = list(shapes.items())[::-1]
        code = next((code for code, known in FLOATS.items() if np.dtype(known) == self.dtype), None)
        if code is None:
            raise ValueError(f"weights are not written as {self.dtype}")
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, shape in shapes.items():
            begin, end = end, end + math.prod(shape) * self.dtype.itemsize
            header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [begin, end]}
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self.stream = path.open("wb", buffering=0)
        self._write_all(memoryview(struct.pack("<Q", len(text)) + text))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.stream.close()
        if kind is None and self.left:
            raise ValueError(f"{self.path} lacks {self.left[-1][0]}")

    def write(self, tensor: np.ndarray) -> None:
        """The next tensor, of any strides and any float dtype; it is cast to the file's."""
        name, shape = self.left.pop()
        if tensor.shape != shape:
            raise ValueError(f"{name} must have shape {shape}, not {tensor.shape}")
        for block in contiguous_blocks(tensor, self.dtype):
            self._write_all(block.reshape(-1).view(np.uint8).data)

    def _write_all(self, data: memoryview) -> None:
        while data:
            data = data[self.stream.write(data) :]


def contiguous_blocks(tensor: np.ndarray, dtype: np.dtype) -> Iterator[np.ndarray]:
    """A tensor's rows in order, cast, a few MB at a time; quick for a transposed matrix too."""
    rows = max(PANEL, REQUEST_BYTES // max(1, math.prod(tensor.shape[1:]) * dtype.itemsize))
    for top in range(0, len(tensor), rows):
        block = tensor[top : top + rows]
        contiguous = np.empty(block.shape, dtype)
        if block.ndim == 2:
            copy_matrix(block, contiguous)
        else:
            contiguous[:] = block
        yield contiguous
