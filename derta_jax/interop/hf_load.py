"""Hugging Face safetensors → sharded parameters: checked first, then read by each process as far as it holds them."""

import contextlib
import functools
import json
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from derta_jax.errors import UserError, did_you_mean
from derta_jax.interop.shares import load_shares, make_share
from derta_jax.interop.source import INDEX, holds, is_url, local_files, weights_place
from derta_jax.interop.tensor_files import (
    FLOATS,
    BrokenFile,
    StoredTensor,
    TensorFile,
    open_tensor_file,
    read_box,
    read_header,
    row_blocks,
)
from derta_jax.models.config import ModelConfig
from derta_jax.models.decoder import Decoder
from derta_jax.models.params import Parameter, parameter_table, tree_from_rows
from derta_jax.models.sharding import check_mesh

IGNORED_SUFFIXES = (".rotary_emb.inv_freq",)
SINGLE = "model.safetensors"
READERS = 8


def load_pretrained(
    directory: str | Path, dtype: str = "float32", mesh: Mesh | None = None
) -> tuple[Decoder, dict[str, Any]]:
    """A model and its parameters, both in `dtype`, from a Hugging Face directory, hub id or URL.

    With a `mesh` the parameters are sharded over it; without, they lie on the first device.
    Raises `UserError` listing every missing, unknown or wrongly shaped tensor and every broken file.
    """
    config = read_model_config(directory)
    return Decoder(config, dtype=jnp.dtype(dtype)), load_params(directory, config, dtype, mesh)


def read_model_config(directory: str | Path) -> ModelConfig:
    """`config.json` of a Hugging Face directory, hub id or URL."""
    file = local_files(directory) / "config.json"
    if not file.is_file():
        raise UserError(f"no model in {directory}: config.json is missing")
    name = f"{directory}/config.json"
    return ModelConfig.from_hf(_read_json(file, name), name)


def load_params(
    directory: str | Path,
    config: ModelConfig,
    dtype: str = "float32",
    mesh: Mesh | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """The parameter tree of `config`; `progress` is told bytes read, and bytes that this process reads in all."""
    if mesh is not None:
        check_mesh(config, mesh)
    tensors = check_weights(directory, config)
    shares = [make_share(row, config, mesh, tensors) for row in parameter_table(config)]
    shares.sort(key=lambda share: -share.bytes)
    total = sum(share.bytes for share in shares)
    done = 0

    def count(read: int) -> None:
        nonlocal done
        done += read
        if progress:
            progress(done, total)

    with _reading(directory), _open_files(tensors.values()) as (files, readers):
        arrays = {share.row.path: array for share, array in load_shares(shares, files, readers, dtype, count)}
    return tree_from_rows(config, lambda row: arrays[row.path])


@contextlib.contextmanager
def open_weights(
    directory: str | Path, config: ModelConfig
) -> Iterator[Callable[[Parameter, tuple[int, ...]], np.ndarray]]:
    """A function that reads `array[index]` of a row's array, [in, out] in the file's dtype, one tensor at a time.

    The indices are those of `row.hf_names`. Raises `UserError` as `check_weights` does.
    """
    tensors = check_weights(directory, config)
    with _open_files(tensors.values()) as (files, readers):

        def tensor_of(row: Parameter, index: tuple[int, ...]) -> np.ndarray:
            tensor = tensors[row.hf_names(config)[index]]
            array = np.empty(tensor.shape, FLOATS[tensor.dtype])
            matrix, file = np.atleast_2d(array), files[tensor.file]
            rows, columns = (slice(0, size) for size in matrix.shape)
            with _reading(directory):
                blocks = row_blocks(file, tensor, rows, columns)
                calls = [readers.submit(read_box, file, tensor, block, columns, matrix[block]) for block in blocks]
                for call in calls:
                    call.result()
            return array.T if row.transposed else array

        yield tensor_of


@contextlib.contextmanager
def _open_files(
    tensors: Iterable[StoredTensor],
) -> Iterator[tuple[dict[str | Path, TensorFile], ThreadPoolExecutor]]:
    """The files of tensors, open, and threads to read them."""
    with contextlib.ExitStack() as opened:
        paths = {tensor.file for tensor in tensors}
        files = {path: opened.enter_context(contextlib.closing(open_tensor_file(path))) for path in paths}
        readers = ThreadPoolExecutor(READERS)
        opened.callback(readers.shutdown, cancel_futures=True)
        yield files, readers


@contextlib.contextmanager
def _reading(directory: str | Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot read the weights in {directory}: {error.strerror or error}") from error


def check_weights(directory: str | Path, config: ModelConfig) -> dict[str, StoredTensor]:
    """Where each tensor lies, once names and shapes in the files are those of the table; reads headers only.

    Raises one `UserError` that lists every missing, unknown or wrongly shaped tensor and every broken file.
    """
    found, problems = _find_tensors(directory)
    expected = {name: row.hf_shape(config) for row in parameter_table(config) for name in row.hf_names(config).values()}
    for name, shape in expected.items():
        tensor = found.get(name)
        if name not in found:
            problems.append(f"missing {name} {list(shape)}")
        elif tensor is not None and tensor.shape != shape:
            problems.append(f"{name} has shape {list(tensor.shape)}, config.json asks for {list(shape)}")
        elif tensor is not None and tensor.dtype not in FLOATS:
            problems.append(f"{name} has dtype {tensor.dtype}; supported: {', '.join(FLOATS)}")
    tied = {"lm_head.weight"} if config.tied_head else set()
    for name in found:
        if name not in expected and name not in tied and not name.endswith(IGNORED_SUFFIXES):
            problems.append(f"unknown {name}{did_you_mean(name, expected.keys() - found.keys())}")
    if problems:
        raise _misfit(directory, problems)
    return {name: tensor for name in expected if (tensor := found[name])}


def _misfit(directory: str | Path, problems: list[str]) -> UserError:
    return UserError(f"the weights in {directory} do not fit its config.json:\n  " + "\n  ".join(problems))


def _find_tensors(directory: str | Path) -> tuple[dict[str, StoredTensor | None], list[str]]:
    """Tensors by name, None for those whose file is missing or broken, and what is wrong with the files."""
    place, index = weights_place(directory), local_files(directory) / INDEX
    if index.is_file():
        names = _read_json(index, f"{directory}/{INDEX}").get("weight_map")
        if not isinstance(names, dict) or not all(_is_file_name(file) for file in names.values()):
            raise UserError(f"{directory}/{INDEX} has no weight_map of file names")
    elif holds(place, SINGLE):
        names = None
    elif holds(place, "*.bin"):
        raise UserError(f"{directory} holds pickled weights (*.bin), which are never loaded: save it as safetensors")
    else:
        raise UserError(f"no weights in {directory}: neither {SINGLE} nor {INDEX}")
    files = [SINGLE] if names is None else sorted(set(names.values()))
    headers: dict[str, dict[str, StoredTensor]] = {}
    problems = []
    with ThreadPoolExecutor(READERS) as readers:
        for file, header in zip(files, readers.map(functools.partial(_try_header, place), files), strict=True):
            if isinstance(header, str):
                problems.append(f"{file} {header}")
            else:
                headers[file] = header
    if names is None:
        if problems:
            raise _misfit(directory, problems)
        return dict(headers[SINGLE]), []
    found: dict[str, StoredTensor | None] = {}
    for name, file in names.items():
        found[name] = headers[file].get(name) if file in headers else None
        if file in headers and found[name] is None:
            problems.append(f"missing {name}: the index says {file}, which does not hold it")
    return found, problems


def _is_file_name(value: Any) -> bool:
    return isinstance(value, str) and value == Path(value).name


def _try_header(place: str | Path, name: str) -> dict[str, StoredTensor] | str:
    """A file's tensors, or what is wrong with it."""
    try:
        with contextlib.closing(open_tensor_file(f"{place}/{name}" if is_url(place) else Path(place) / name)) as file:
            return read_header(file)
    except FileNotFoundError:
        return f"is missing: {INDEX} names it"
    except BrokenFile as error:
        return f"is not a whole safetensors file: {error}"
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"


def _read_json(file: Path, name: str) -> dict[str, Any]:
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{name} is not valid JSON: {error}") from error
    if not isinstance(raw, dict):
        raise UserError(f"{name} must hold a JSON object, not a {type(raw).__name__}")
    return raw
