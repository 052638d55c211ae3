"""A process's share of each parameter: which bytes of the files it is, and its way to the devices.

Blocks of rows are read, transposed and put where they belong by several threads, in the file's dtype; the cast is the
devices' work. On CPU devices the arrays are the memory that was read into, so nothing is held twice.
"""

import collections
import dataclasses
import functools
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, Sharding, SingleDeviceSharding

from derta_jax.interop.tensor_files import FLOATS, StoredTensor, TensorFile, copy_matrix, read_box, row_blocks
from derta_jax.models.config import ModelConfig
from derta_jax.models.params import Parameter
from derta_jax.models.sharding import partition_spec

ALIGNMENT = 64
"""Bytes; memory that starts at a multiple of it becomes a CPU device's array without a copy."""

Corner = tuple[int, ...]

_thread = threading.local()


@dataclasses.dataclass(frozen=True)
class Share:
    """What this process's devices hold of one parameter: pieces of `sizes`, each from its corner on.

    Sizes and corners are those of our array, global places of the parameter.
    """

    row: Parameter
    shape: tuple[int, ...]
    sharding: Sharding
    sizes: tuple[int, ...]
    corners: dict[Any, Corner]
    tensors: dict[tuple[int, ...], StoredTensor]

    @functools.cached_property
    def dtype(self) -> np.dtype:
        """Of the host's memory: the file's, unless it has several; devices do not hold float64."""
        stored = {tensor.dtype for tensor in self.tensors.values()}
        return np.dtype(FLOATS[stored.pop()] if len(stored) == 1 and stored != {"F64"} else np.float32)

    @property
    def bytes(self) -> int:
        """Of the different pieces together; replicas are read once."""
        return len(set(self.corners.values())) * math.prod(self.sizes) * self.dtype.itemsize


def make_share(row: Parameter, config: ModelConfig, mesh: Mesh | None, tensors: Mapping[str, StoredTensor]) -> Share:
    """This process's share of a parameter that is sharded over `mesh`, or that lies on the first device."""
    shape = row.shape(config)
    sharding: Sharding = SingleDeviceSharding(jax.local_devices()[0])
    if mesh is not None:
        sharding = NamedSharding(mesh, partition_spec(row.axes))
    indices = sharding.addressable_devices_indices_map(shape)
    corners = {device: tuple(axis.start or 0 for axis in index or ()) for device, index in indices.items()}
    stored = {index: tensors[name] for index, name in row.hf_names(config).items()}
    return Share(row, shape, sharding, sharding.shard_shape(shape), corners, stored)


def load_shares(
    shares: Iterable[Share],
    files: Mapping[str | Path, TensorFile],
    readers: ThreadPoolExecutor,
    dtype: str,
    read: Callable[[int], None],
) -> Iterator[tuple[Share, jax.Array]]:
    """Each share as this process's part of a global array in `dtype`, while the next one is being read.

    `read` is told the bytes of each block.
    """
    waiting: collections.deque[tuple[Share, dict[Corner, np.ndarray], list[Future[int]]]] = collections.deque()
    for share in shares:
        pieces = {corner: _aligned(share.sizes, share.dtype) for corner in set(share.corners.values())}
        waiting.append((share, pieces, [readers.submit(fill) for fill in _fills(share, pieces, files)]))
        if len(waiting) > 1:
            yield _finish(*waiting.popleft(), dtype, read)
        del pieces
    while waiting:
        yield _finish(*waiting.popleft(), dtype, read)


def _aligned(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def _finish(
    share: Share,
    pieces: dict[Corner, np.ndarray],
    futures: list[Future[int]],
    dtype: str,
    read: Callable[[int], None],
) -> tuple[Share, jax.Array]:
    for future in futures:
        read(future.result())
    arrays = [
        jax.block_until_ready(jax.device_put(pieces[corner], device).astype(dtype))
        for device, corner in share.corners.items()
    ]
    return share, jax.make_array_from_single_device_arrays(share.shape, share.sharding, arrays)


def _fills(
    share: Share, pieces: Mapping[Corner, np.ndarray], files: Mapping[str | Path, TensorFile]
) -> Iterator[Callable[[], int]]:
    """Calls, for any threads, that together fill the pieces. Each reads a block of rows of one tensor, once."""
    stacked = share.row.stacked
    wanted: dict[tuple[int, ...], list[_Target]] = collections.defaultdict(list)
    for corner, piece in pieces.items():
        for inside in np.ndindex(share.sizes[:stacked]):
            place = tuple(first + offset for first, offset in zip(corner[:stacked], inside, strict=True))
            wanted[place].append(_Target.make(corner[stacked:], piece[inside], share.row.transposed))
    for place, targets in wanted.items():
        tensor = share.tensors[place]
        for neighbours in _neighbours(targets):
            first, last = neighbours[0], neighbours[-1]
            columns = slice(first.column, last.column + last.matrix.shape[1])
            rows = slice(first.top, first.top + len(first.matrix))
            for block in row_blocks(files[tensor.file], tensor, rows, columns):
                yield functools.partial(_fill, files[tensor.file], tensor, block, columns, neighbours)


class _Target(NamedTuple):
    """A part of a tensor that goes into one piece: a view of it as the file has it, [rows, columns]."""

    top: int
    column: int
    matrix: np.ndarray

    @classmethod
    def make(cls, corner: Corner, array: np.ndarray, transposed: bool) -> "_Target":
        """A vector is a matrix of one row."""
        top, column = (0, *corner)[-2:]
        return cls(column, top, array.T) if transposed else cls(top, column, np.atleast_2d(array))


def _neighbours(targets: list[_Target]) -> Iterator[list[_Target]]:
    """Targets that lie side by side in the file, so that they can be read together."""
    together: list[_Target] = []
    for target in sorted(targets, key=lambda target: target[:2]):
        if together and (together[-1].top, together[-1].column + together[-1].matrix.shape[1]) != target[:2]:
            yield together
            together = []
        together.append(target)
    yield together


def _fill(file: TensorFile, tensor: StoredTensor, rows: slice, columns: slice, targets: list[_Target]) -> int:
    """Read some rows into targets that lie side by side; returns how many bytes they take there."""
    blocks = [target.matrix[rows.start - target.top : rows.stop - target.top] for target in targets]
    if len(blocks) == 1 and blocks[0].dtype == FLOATS[tensor.dtype] and blocks[0].strides[1] == blocks[0].itemsize:
        read_box(file, tensor, rows, columns, blocks[0])
    else:
        box = _scratch((rows.stop - rows.start, columns.stop - columns.start), np.dtype(FLOATS[tensor.dtype]))
        read_box(file, tensor, rows, columns, box)
        for target, block in zip(targets, blocks, strict=True):
            first = target.column - columns.start
            copy_matrix(box[:, first : first + block.shape[1]], block)
    return sum(block.nbytes for block in blocks)


def _scratch(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Memory of the thread, the same again and again: the kernel has to clear what is fresh."""
    size = math.prod(shape) * dtype.itemsize
    if getattr(_thread, "memory", np.empty(0)).nbytes < size:
        _thread.memory = np.empty(size, np.uint8)
    return _thread.memory[:size].view(dtype).reshape(shape)
