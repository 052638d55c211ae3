"""A model to a Hugging Face directory, a PEFT adapter or a checkpoint; weights pass through one tensor at a time."""

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.filesize import decimal

from derta_jax.config import MeshShape, dump_config
from derta_jax.errors import UserError
from derta_jax.interop.hf_export import copy_model_files, parse_size, whole_directory, write_model
from derta_jax.interop.hf_load import open_weights
from derta_jax.interop.peft import write_adapter
from derta_jax.interop.tokenizer import TOKENIZER_FILES
from derta_jax.models.lora import Adapter
from derta_jax.models.params import Parameter, count_parameters
from derta_jax.training.checkpoint import Checkpoints
from derta_jax.training.mesh import make_mesh, single_device_mesh
from derta_jax.training.model_card import model_card
from derta_jax.training.progress import byte_bar, load_with_progress, peak_memory
from derta_jax.training.restore import RUN_CONFIG_IN_EXPORT, ModelSource, adapter_of, find_model, run_checkpoints

TensorOf = Callable[[Parameter, tuple[int, ...]], np.ndarray]
"""(row, index) → one tensor as we lay it out, [in, out]."""


def export_model(
    model: str | Path,
    directory: str | Path,
    console: Console,
    step: int | None = None,
    dtype: str | None = None,
    max_shard_size: str = "5GB",
    merged: bool = False,
    base_name: str | None = None,
) -> None:
    """Write a model as a Hugging Face directory, with a model card, tokenizer, chat template and its run's config.

    What was trained with LoRA becomes a PEFT adapter, or a whole model when `merged`. The adapter names `base_name` as
    what it goes on, or `model.path`, which then must be what peft can load. `dtype` defaults to that of the original's
    config.json (an adapter's to float32). Raises `UserError`; the directory appears when it is whole.
    """
    source = find_model(model, step)
    adapter = adapter_of(source, single_device_mesh()) if source.base else None
    extra_files = {"README.md": model_card(source, Path(directory).name, merged, base_name)}
    if source.run:
        extra_files[RUN_CONFIG_IN_EXPORT] = dump_config(source.run)
    if adapter is not None and source.base is not None and not merged:
        base_name = base_name or _loadable_base(source.base)
        _export_adapter(source, base_name, adapter, Path(directory), dtype or "float32", extra_files)
    else:
        source.check()
        dtype = dtype or stored_dtype(source)
        total = count_parameters(source.config)
        with open_tensors(source, adapter) as tensor_of, byte_bar(console, "export") as progress:
            write_model(
                source.config,
                tensor_of,
                directory,
                source.files,
                dtype,
                parse_size(max_shard_size),
                extra_files,
                progress,
            )
        size = decimal(total * jnp.dtype(dtype).itemsize)
        console.print(f"weights   {size} in {dtype}, {peak_memory()}", highlight=False)
    console.print(f"exported  to {directory}", highlight=False, soft_wrap=True)


def convert(
    model: str | Path, directory: str | Path, console: Console, dtype: str | None = None, max_shard_size: str = "5GB"
) -> None:
    """A checkpoint becomes a Hugging Face directory, anything else a checkpoint."""
    if find_model(model).step is None:
        convert_to_checkpoint(model, directory, console, dtype)
    else:
        export_model(model, directory, console, None, dtype, max_shard_size, merged=True)


def convert_to_checkpoint(model: str | Path, directory: str | Path, console: Console, dtype: str | None = None) -> None:
    """Write a model's weights as a checkpoint of step 0, from which `model.path` reads them as fast as disks allow.

    `dtype` defaults to that of the original's config.json. The directory appears when it is whole.
    """
    source = find_model(model)
    source.check()
    with whole_directory(directory) as partial:
        params = load_with_progress(source, dtype or stored_dtype(source), make_mesh(MeshShape()), console)
        copy_model_files(source.files, partial / "model")
        with Checkpoints(partial / "checkpoints") as checkpoints:
            checkpoints.save_parts(0, {"params": params}, {})
    console.print(f"converted to {directory}", highlight=False, soft_wrap=True)


def stored_dtype(source: ModelSource) -> str:
    """The dtype that the original's config.json names; float32 where it names none."""
    raw = json.loads((source.files / "config.json").read_text(encoding="utf-8"))
    return raw.get("dtype") or raw.get("torch_dtype") or "float32"


@contextlib.contextmanager
def open_tensors(source: ModelSource, adapter: Adapter | None = None) -> Iterator[TensorOf]:
    """A function that reads one of a model's tensors from disk, the adapter merged into it in float32."""
    if source.base is not None:
        with open_tensors(source.base) as base_tensor:
            yield _merging(base_tensor, adapter or adapter_of(source, single_device_mesh()))
    elif source.step is not None:
        with run_checkpoints(source) as checkpoints:
            read = checkpoints.open_params(source.step)
            yield lambda row, index: read(row.path, index)
    else:
        with open_weights(source.path, source.config) as tensor_of:
            yield tensor_of


def _merging(base_tensor: TensorOf, adapter: Adapter) -> TensorOf:
    factors = {
        name: {side: np.asarray(array) for side, array in pair.items()} for name, pair in adapter.factors.items()
    }

    def tensor_of(row: Parameter, index: tuple[int, ...]) -> np.ndarray:
        tensor = base_tensor(row, index)
        if not row.lora or row.name not in factors:
            return tensor
        a, b = (factors[row.name][side][index] for side in ("a", "b"))
        return tensor.astype(np.float32) + np.float32(adapter.scales[row.name]) * (a @ b)

    return tensor_of


def _loadable_base(base: ModelSource) -> str:
    if base.step is not None or base.base is not None:
        kind = "a checkpoint" if base.step is not None else "an adapter itself"
        raise UserError(
            f"the adapter goes on {base.path}, which is {kind}, and which peft could not load: export it --merged, "
            "or say with --base which Hugging Face model that is"
        )
    return base.path


def _export_adapter(
    source: ModelSource,
    base_name: str,
    adapter: Adapter,
    directory: Path,
    dtype: str,
    extra_files: dict[str, str],
) -> None:
    with whole_directory(directory) as partial:
        dropout = source.run.lora.dropout if source.run and source.run.lora else 0.0
        write_adapter(adapter, source.config, partial, base_name, dropout, dtype)
        copy_model_files(source.files, partial, TOKENIZER_FILES)
        for name, text in extra_files.items():
            (partial / name).write_text(text, encoding="utf-8")
