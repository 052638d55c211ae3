"""Parameters → a Hugging Face directory that transformers and vLLM load: safetensors, configs, tokenizer files.

Tensors are written one at a time, as they are made; no more than one is in host memory.
"""

import contextlib
import functools
import itertools
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from derta_jax.errors import UserError
from derta_jax.interop.source import INDEX, local_files
from derta_jax.interop.tensor_files import TensorWriter
from derta_jax.interop.tokenizer import TOKENIZER_FILES
from derta_jax.models.config import ModelConfig
from derta_jax.models.decoder import Decoder
from derta_jax.models.params import Parameter, leaves_with_rows, parameter_table

COPIED_FILES = ("config.json", "generation_config.json", *TOKENIZER_FILES)
BLOCK_BYTES = 2 << 20
MESSAGE_BYTES = 1024
URL = re.compile(r"\w[\w+.-]+:/")
"""With one slash too: a `Path` made of a URL has lost the other."""

Progress = Callable[[int, int], None]


def export_pretrained(
    model: Decoder,
    params: dict[str, Any],
    directory: str | Path,
    source: str | Path | None = None,
    dtype: str | None = None,
    max_shard_size: str = "5GB",
    extra_files: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> None:
    """Write `params` to `directory` under Hugging Face names, in `dtype` (theirs where None).

    Config, generation config, tokenizer and chat template are copied from `source`, the original (a directory, hub id
    or URL); without one a config.json is made from the model. `extra_files` are texts by file name. `progress` is told
    bytes written, and bytes in all, where they are written. The directory appears when it is whole.

    With several processes all must call it: process 0 writes, and when one fails, all raise.
    Raises `UserError` when the directory exists already and is not empty.
    """
    arrays = {row.path: array for row, array in leaves_with_rows(model.config, params)}

    def tensor_of(row: Parameter, index: tuple[int, ...]) -> np.ndarray:
        return fetch_tensor(arrays[row.path], index)

    dtype = dtype or jnp.dtype(params["embed"].dtype).name
    shard_bytes = parse_size(max_shard_size)
    write_model(model.config, tensor_of, directory, source, dtype, shard_bytes, extra_files, progress)


def write_model(
    config: ModelConfig,
    tensor_of: Callable[[Parameter, tuple[int, ...]], np.ndarray],
    directory: str | Path,
    source: str | Path | None,
    dtype: str,
    max_shard_bytes: int,
    extra_files: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> None:
    """`export_pretrained` of tensors that `tensor_of` makes, one after another, on every process.

    `tensor_of(row, index)` gives `array[index]` of the row's array, [in, out], in any float dtype; the indices are
    those of `row.hf_names`.
    """
    shards = _plan_shards(config, jnp.dtype(dtype).itemsize, max_shard_bytes)
    tensors = _make_tensors(tensor_of, shards)
    try:
        if jax.process_index() == 0:
            if source is not None and not (local_files(source) / "config.json").is_file():
                raise UserError(f"no model in {source} to copy from: config.json is missing")
            with whole_directory(directory) as partial:
                _write_config(config, partial, source, jnp.dtype(dtype).name)
                for name, text in (extra_files or {}).items():
                    (partial / name).write_text(text, encoding="utf-8")
                _write_shards(config, partial, shards, jnp.dtype(dtype), tensors, progress)
        else:
            for _ in tensors:
                pass
    except _FailedElsewhere:
        raise
    except Exception as error:  # whatever it is: the other processes wait, and must hear of it before it goes on up
        _meet(str(error))
        raise
    _meet()


@contextlib.contextmanager
def whole_directory(directory: str | Path) -> Iterator[Path]:
    """A directory to write into that becomes `directory` at the end, and disappears on errors.

    Raises `UserError` when `directory` exists already and is not empty, and for whatever the disk refuses.
    """
    if URL.match(str(directory)):
        raise UserError(f"cannot write to {directory}: choose a local directory, and copy it from there")
    directory = Path(directory)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(f"{directory} already exists: choose another directory, or remove it first")
    partial = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        if directory.exists():
            directory.rmdir()
        os.replace(partial, directory)
    except OSError as error:
        raise UserError(f"cannot write {directory}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def fetch_tensor(array: Any, index: tuple[int, ...]) -> np.ndarray:
    """`array[index]` in host memory; of an array that lies on several processes all must ask for it."""
    if not isinstance(array, jax.Array):
        return np.asarray(array[index])
    if not array.is_fully_addressable:
        return gather_tensor(array, index)
    tensor = np.empty(array.shape[len(index) :], array.dtype)
    for shard in array.addressable_shards:
        starts = [axis.start or 0 for axis in shard.index[: len(index)]]
        local = tuple(place - start for place, start in zip(index, starts, strict=True))
        if shard.replica_id == 0 and all(
            0 <= place < size for place, size in zip(local, shard.data.shape, strict=False)
        ):
            part = _part_in_host_memory(shard.data, local)
            if part.shape == tensor.shape:
                return part
            tensor[shard.index[len(index) :]] = part
    return tensor


def _part_in_host_memory(array: jax.Array, index: tuple[int, ...]) -> np.ndarray:
    """`array[index]` of an array on one device: a view where its memory is the host's."""
    if next(iter(array.devices())).platform == "cpu":
        return np.asarray(array)[index]
    return np.asarray(_take(array, np.array(index, np.int32)))


@jax.jit
def _take(array: jax.Array, index: jax.Array) -> jax.Array:
    for place in index:
        array = jax.lax.dynamic_index_in_dim(array, place, keepdims=False)
    return array


def gather_tensor(array: jax.Array, index: tuple[int, ...]) -> np.ndarray:
    """`array[index]` of a sharded array, in host memory on every process; all must call it.

    It comes in blocks, so that no device holds more of the tensor than a block and its own share.
    """
    shape = array.shape[len(index) :]
    share = array.sharding.shard_shape(array.shape)[len(index)]
    rows = max(1, min(share, BLOCK_BYTES * share // (math.prod(shape) * array.dtype.itemsize)))
    tensor = np.empty((shape[0] // share, share, *shape[1:]), array.dtype)
    for top in range(0, share, rows):
        top = min(top, share - rows)
        bits = jax.block_until_ready(_gather_rows(array, np.array(index, np.int32), top, rows, array.sharding))
        tensor[:, top : top + rows] = (
            np.asarray(bits.addressable_data(0)).view(array.dtype).reshape(-1, rows, *shape[1:])
        )
    return tensor.reshape(shape)


@functools.partial(jax.jit, static_argnums=(3, 4))
def _gather_rows(array: jax.Array, index: jax.Array, top: int, rows: int, sharding: NamedSharding) -> jax.Array:
    """Rows `top` to `top + rows` of each share of one tensor, as integers, on every device.

    Step by step on each device, because the compiler would gather whole tensors and take the rows then.
    """
    split = [*sharding.spec, *[None] * (array.ndim - len(sharding.spec))]
    stacked = len(index)

    def gather(share: jax.Array, index: jax.Array, top: int) -> jax.Array:
        # CPUs would convert all of a bfloat16 array to float32
        bits = jax.lax.bitcast_convert_type(share, f"uint{8 * array.dtype.itemsize}")
        for place, size in zip(index, share.shape, strict=False):
            bits = jax.lax.dynamic_index_in_dim(bits, place % size, keepdims=False)
        bits = jax.lax.dynamic_slice_in_dim(bits, top, rows)
        for axis, names in enumerate(split[stacked:]):
            if names:
                bits = jax.lax.all_gather(bits, names, axis=axis, tiled=True)
        for place, size, names in zip(index, share.shape, split, strict=False):
            if names:
                bits = jax.lax.dynamic_index_in_dim(jax.lax.all_gather(bits, names), place // size, keepdims=False)
        return bits

    everywhere = PartitionSpec()
    specs = (sharding.spec, everywhere, everywhere)
    return jax.shard_map(gather, mesh=sharding.mesh, in_specs=specs, out_specs=everywhere, check_vma=False)(
        array, index, top
    )


def copy_model_files(source: str | Path, directory: str | PathLike[str], names: Iterable[str] = COPIED_FILES) -> None:
    """Copy everything but the weights, to disk or a bucket: configs, tokenizer, chat template, as far as there are."""
    files, place = local_files(source), epath.Path(directory)
    place.mkdir(parents=True, exist_ok=True)
    for name in names:
        if (files / name).is_file():
            (place / name).write_bytes((files / name).read_bytes())


def parse_size(text: str) -> int:
    """Bytes of `5GB`, `200MB` (powers of ten) or `1GiB` (powers of two)."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]i?)?B?", text.strip(), re.IGNORECASE)
    if not match:
        raise UserError(f"size {text!r} is not like 5GB or 200MB")
    number, unit = match.groups()
    power = "KMGT".index(unit[0].upper()) + 1 if unit else 0
    return int(float(number) * (1024 if unit and unit[1:] else 1000) ** power)


class _Planned(NamedTuple):
    """A tensor that will be written."""

    row: Parameter
    place: tuple[int, ...]
    name: str
    bytes: int


def _plan_shards(config: ModelConfig, itemsize: int, max_shard_bytes: int) -> dict[str, list[_Planned]]:
    """Files of at most `max_shard_bytes`, or of one tensor, and what they hold."""
    shards: list[list[_Planned]] = [[]]
    room = max_shard_bytes
    for row in parameter_table(config):
        size = math.prod(row.hf_shape(config)) * itemsize
        for index, name in row.hf_names(config).items():
            if shards[-1] and size > room:
                shards.append([])
                room = max_shard_bytes
            shards[-1].append(_Planned(row, index, name, size))
            room -= size
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{n:05d}-of-{len(shards):05d}.safetensors": shard for n, shard in enumerate(shards, start=1)}


def _make_tensors(
    tensor_of: Callable[[Parameter, tuple[int, ...]], np.ndarray], shards: Mapping[str, list[_Planned]]
) -> Iterator[np.ndarray]:
    """The planned tensors as Hugging Face lays them out; all processes make the same one at the same time."""
    for tensor in itertools.chain(*shards.values()):
        _meet()
        array = tensor_of(tensor.row, tensor.place)
        yield array.T if tensor.row.transposed else array
        del array  # before the next one is made


class _FailedElsewhere(UserError):
    """Another process cannot go on."""


def _meet(problem: str = "") -> None:
    """All processes meet here before each tensor and at the end, so that none waits for one that has failed."""
    if jax.process_count() == 1:
        return
    message = np.frombuffer(problem.encode()[:MESSAGE_BYTES].ljust(MESSAGE_BYTES), np.uint8)
    messages = [bytes(row).decode(errors="ignore").strip() for row in multihost_utils.process_allgather(message)]
    if not problem and any(messages):
        raise _FailedElsewhere(next(filter(None, messages)))


def _write_shards(
    config: ModelConfig,
    directory: Path,
    shards: Mapping[str, list[_Planned]],
    dtype: np.dtype,
    tensors: Iterator[np.ndarray],
    progress: Progress | None,
) -> None:
    total = sum(tensor.bytes for planned in shards.values() for tensor in planned)
    done = 0
    for file, planned in shards.items():
        shapes = {tensor.name: tensor.row.hf_shape(config) for tensor in planned}
        with TensorWriter(directory / file, shapes, dtype) as writer:
            for tensor in planned:
                writer.write(next(tensors))
                done += tensor.bytes
                if progress:
                    progress(done, total)
    if len(shards) > 1:
        weight_map = {tensor.name: file for file, planned in shards.items() for tensor in planned}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write_config(config: ModelConfig, directory: Path, source: str | Path | None, dtype: str) -> None:
    if source is None:
        raw = config.to_hf()
    else:
        copy_model_files(source, directory)
        raw = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        raw.pop("torch_dtype", None)
    (directory / "config.json").write_text(json.dumps(raw | {"dtype": dtype}, indent=2) + "\n", encoding="utf-8")
