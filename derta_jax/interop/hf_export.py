"""Parameters → a Hugging Face directory that transformers and vLLM load: safetensors, configs, tokenizer files."""

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from derta_jax.errors import UserError
from derta_jax.interop.tokenizer import TOKENIZER_FILES
from derta_jax.models.config import ModelConfig
from derta_jax.models.decoder import Decoder
from derta_jax.models.params import Parameter, leaves_with_rows

COPIED_FILES = ("config.json", "generation_config.json", *TOKENIZER_FILES)


def export_pretrained(
    model: Decoder,
    params: dict[str, Any],
    directory: str | Path,
    source: str | Path | None = None,
    dtype: str | None = None,
    max_shard_size: str = "5GB",
) -> None:
    """Write `params` to `directory` under Hugging Face names, in `dtype` (theirs where None).

    Config, generation config, tokenizer and chat template are copied from `source`, the original's directory; without
    one a config.json is made from the model. The directory appears when it is whole.
    Raises `UserError` when it exists already and is not empty.
    """
    directory = Path(directory)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(f"{directory} already exists: choose another directory, or remove it first")
    if source is not None and not (Path(source) / "config.json").is_file():
        raise UserError(f"no model in {source} to copy from: config.json is missing")
    partial = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        np_dtype = jnp.dtype(dtype or params["embed"].dtype)
        _write_config(model.config, partial, source, np_dtype.name)
        _write_weights(model.config, params, partial, np_dtype, parse_size(max_shard_size))
        if directory.exists():
            directory.rmdir()
        os.replace(partial, directory)
    except OSError as error:
        raise UserError(f"cannot write {directory}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def copy_model_files(source: str | Path, directory: Path) -> None:
    """Copy everything but the weights: configs, tokenizer, chat template."""
    directory.mkdir(parents=True, exist_ok=True)
    for name in COPIED_FILES:
        file = Path(source) / name
        if file.is_file():
            shutil.copyfile(file, directory / name)


def parse_size(text: str) -> int:
    """Bytes of `5GB`, `200MB` (powers of ten) or `1GiB` (powers of two)."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]i?)?B?", text.strip(), re.IGNORECASE)
    if not match:
        raise UserError(f"size {text!r} is not like 5GB or 200MB")
    number, unit = match.groups()
    power = "KMGT".index(unit[0].upper()) + 1 if unit else 0
    return int(float(number) * (1024 if unit and unit[1:] else 1000) ** power)


def _write_config(config: ModelConfig, directory: Path, source: str | Path | None, dtype: str) -> None:
    if source is None:
        raw = config.to_hf()
    else:
        copy_model_files(source, directory)
        raw = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        raw.pop("torch_dtype", None)
    (directory / "config.json").write_text(json.dumps(raw | {"dtype": dtype}, indent=2) + "\n", encoding="utf-8")


def _write_weights(
    config: ModelConfig, params: dict[str, Any], directory: Path, dtype: np.dtype, max_shard_bytes: int
) -> None:
    """Shards of at most `max_shard_bytes`, named once their number is known, and an index when there are several."""
    shards: list[list[str]] = []
    tensors: dict[str, np.ndarray] = {}
    total = 0

    def flush() -> None:
        if tensors:
            save_file(tensors, directory / f"shard-{len(shards)}", metadata={"format": "pt"})
            shards.append(list(tensors))
            tensors.clear()

    for row, array in leaves_with_rows(config, params):
        for name, tensor in hf_tensors(config, row, array, dtype):
            if tensors and sum(held.nbytes for held in tensors.values()) + tensor.nbytes > max_shard_bytes:
                flush()
            tensors[name] = tensor
            total += tensor.nbytes
    flush()
    if len(shards) == 1:
        os.replace(directory / "shard-0", directory / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        os.replace(directory / f"shard-{number}", directory / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def hf_tensors(config: ModelConfig, row: Parameter, array: Any, dtype: np.dtype) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of one row under their Hugging Face names, one layer at a time in host memory."""
    for layer, name in enumerate(row.hf_names(config)):
        tensor = np.asarray(array[layer] if row.stacked else array).astype(dtype)
        # safetensors writes the buffer as it lies: a transposed view would be written wrongly, without an error
        yield name, np.ascontiguousarray(tensor.T if row.transposed else tensor)
