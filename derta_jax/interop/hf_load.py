"""Hugging Face safetensors → sharded parameters: each device's slice is read from disk, nothing else, without torch."""

import functools
import json
import struct
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import Mesh, NamedSharding, Sharding, SingleDeviceSharding
from safetensors import SafetensorError, safe_open

from derta_jax.errors import UserError, did_you_mean
from derta_jax.models.config import ModelConfig
from derta_jax.models.decoder import Decoder
from derta_jax.models.params import Parameter, parameter_table, tree_from_rows
from derta_jax.models.sharding import check_mesh, partition_spec

IGNORED_SUFFIXES = (".rotary_emb.inv_freq",)
FLOATS = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "F64": np.float64}


def load_pretrained(
    directory: str | Path, dtype: str = "float32", mesh: Mesh | None = None
) -> tuple[Decoder, dict[str, Any]]:
    """A model and its parameters, both in `dtype`, from a local Hugging Face directory.

    With a `mesh` the parameters are sharded over it; without, they lie on the first device.
    Raises `UserError` listing every missing, unknown or wrongly shaped tensor.
    """
    config = read_model_config(directory)
    return Decoder(config, dtype=jnp.dtype(dtype)), load_params(directory, config, dtype, mesh)


def read_model_config(directory: str | Path) -> ModelConfig:
    """`config.json` of a Hugging Face directory."""
    file = Path(directory) / "config.json"
    if not file.is_file():
        raise UserError(f"no model in {directory}: config.json is missing")
    return ModelConfig.from_hf(_read_json(file), str(file))


def load_params(
    directory: str | Path, config: ModelConfig, dtype: str = "float32", mesh: Mesh | None = None
) -> dict[str, Any]:
    """The parameter tree of `config`, read slice by slice to where each device wants it."""
    directory = Path(directory)
    if mesh is not None:
        check_mesh(config, mesh)
    files = check_weights(directory, config)
    open_file = functools.lru_cache(maxsize=None)(lambda file: safe_open(file, framework="numpy"))

    def load(row: Parameter) -> jax.Array:
        slices = [open_file(files[name]).get_slice(name) for name in row.hf_names(config)]
        if mesh is None:
            sharding: Sharding = SingleDeviceSharding(jax.local_devices()[0])
        else:
            sharding = NamedSharding(mesh, partition_spec(row.axes))
        read = functools.partial(_read_slice, row, slices, np.dtype(jnp.dtype(dtype)))
        return jax.make_array_from_callback(row.shape(config), sharding, read)

    return tree_from_rows(config, load)


def check_weights(directory: str | Path, config: ModelConfig) -> dict[str, Path]:
    """The file of each tensor, once names and shapes on disk are those of the table; reads headers only.

    Raises one `UserError` that lists every missing, unknown or wrongly shaped tensor.
    """
    directory = Path(directory)
    files = _locate_tensors(directory)
    expected = {name: row.hf_shape(config) for row in parameter_table(config) for name in row.hf_names(config)}
    headers = {file: _read_header(file) for file in sorted(set(files.values()))}
    problems = []
    for name, shape in expected.items():
        if name not in files:
            problems.append(f"missing {name} {list(shape)}")
            continue
        header = headers[files[name]].get(name)
        if header is None:
            problems.append(f"missing {name}: the index says {files[name].name}, which does not hold it")
        elif tuple(header["shape"]) != shape:
            problems.append(f"{name} has shape {header['shape']}, config.json asks for {list(shape)}")
        elif header["dtype"] not in FLOATS:
            problems.append(f"{name} has dtype {header['dtype']}; supported: {', '.join(FLOATS)}")
    tied = {"lm_head.weight"} if config.tied_head else set()
    for name in files:
        if name not in expected and name not in tied and not name.endswith(IGNORED_SUFFIXES):
            problems.append(f"unknown {name}{did_you_mean(name, expected.keys() - files.keys())}")
    if problems:
        raise UserError(f"the weights in {directory} do not fit its config.json:\n  " + "\n  ".join(problems))
    return files


def _locate_tensors(directory: Path) -> dict[str, Path]:
    """Tensor name → file, from the index of a sharded checkpoint or from the single file."""
    index = directory / "model.safetensors.index.json"
    single = directory / "model.safetensors"
    if index.is_file():
        names = _read_json(index).get("weight_map")
        if not isinstance(names, dict):
            raise UserError(f"{index} has no weight_map")
        located = {name: directory / file for name, file in names.items()}
        if missing := sorted({file.name for file in located.values() if not file.is_file()}):
            raise UserError(f"{directory} lacks {', '.join(missing)}, which {index.name} names")
        return located
    if single.is_file():
        return dict.fromkeys(_read_header(single), single)
    if any(directory.glob("*.bin")):
        raise UserError(f"{directory} holds pickled weights (*.bin), which are never loaded: save it as safetensors")
    raise UserError(f"no weights in {directory}: neither {single.name} nor {index.name}")


def _read_json(file: Path) -> dict[str, Any]:
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(raw, dict):
        raise UserError(f"{file} must hold a JSON object, not a {type(raw).__name__}")
    return raw


def _read_header(file: Path) -> dict[str, Any]:
    """Names, shapes and dtypes of a safetensors file; a truncated or foreign file is a `UserError`."""
    try:
        with safe_open(file, framework="numpy"):
            pass
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(length))
    except (SafetensorError, OSError, ValueError, struct.error) as error:
        raise UserError(f"{file} is not a whole safetensors file: {error}") from error
    header.pop("__metadata__", None)
    return header


def _read_slice(row: Parameter, slices: list[Any], dtype: np.dtype, index: tuple[slice, ...]) -> np.ndarray:
    """The part `index` of our array: layers stacked on the first axis, linear layers transposed."""
    layers, inner = (slices[index[0]], index[1:]) if row.stacked else (slices, index)
    if row.transposed:
        parts = [tensor[inner[::-1]].T.astype(dtype) for tensor in layers]
    else:
        parts = [tensor[inner].astype(dtype) for tensor in layers]
    return np.stack(parts) if row.stacked else parts[0]
