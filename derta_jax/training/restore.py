"""From what a user calls a model, a Hugging Face directory or a run directory, to parameters; and a run's export."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from derta_jax.config import RunConfig, dump_config, load_config
from derta_jax.errors import UserError
from derta_jax.interop.hf_export import export_pretrained
from derta_jax.interop.hf_load import load_pretrained, read_model_config
from derta_jax.models.decoder import Decoder
from derta_jax.models.params import tree_from_rows
from derta_jax.models.sharding import check_mesh, param_shardings
from derta_jax.training.checkpoint import Checkpoints
from derta_jax.training.mesh import single_device_mesh

RUN_CONFIG_IN_EXPORT = "derta_config.yaml"


@dataclasses.dataclass(frozen=True)
class RestoredModel:
    """`files` holds config.json and the tokenizer; `run` is the config it was trained with, if we trained it."""

    model: Decoder
    params: Any
    files: Path
    run: RunConfig | None


def restore_model(path: str | Path, dtype: str, mesh: Mesh, step: int | None = None) -> RestoredModel:
    """Load a Hugging Face directory, or a run directory's checkpoint (the newest where `step` is None).

    Parameters are in `dtype`, which is the compute dtype too. Raises `UserError` when `path` is neither.
    """
    path = Path(path)
    if (path / "checkpoints").is_dir():
        return _restore_run(path, dtype, mesh, step)
    if not (path / "config.json").is_file():
        raise UserError(f"{path} is neither a Hugging Face directory (config.json) nor a run (checkpoints/)")
    model, params = load_pretrained(path, dtype, mesh)
    trained = path / RUN_CONFIG_IN_EXPORT
    return RestoredModel(model, params, path, load_config(trained) if trained.is_file() else None)


def export_run(
    run: str | Path, directory: str | Path, step: int | None, dtype: str | None, max_shard_size: str
) -> None:
    """Write a run's checkpoint as a Hugging Face directory, with the config it was trained with beside it.

    `dtype` defaults to the one that the original's config.json names.
    """
    run = Path(run)
    if not (run / "checkpoints").is_dir():
        raise UserError(f"{run} is not a run directory: it has no checkpoints/")
    restored = _restore_run(run, "float32", single_device_mesh(), step)
    raw = json.loads((restored.files / "config.json").read_text(encoding="utf-8"))
    dtype = dtype or raw.get("dtype") or raw.get("torch_dtype") or "float32"
    export_pretrained(restored.model, restored.params, directory, restored.files, dtype, max_shard_size)
    if restored.run:
        (Path(directory) / RUN_CONFIG_IN_EXPORT).write_text(dump_config(restored.run), encoding="utf-8")


def _restore_run(path: Path, dtype: str, mesh: Mesh, step: int | None) -> RestoredModel:
    files = path / "model"
    config = read_model_config(files)
    check_mesh(config, mesh)
    with Checkpoints(path / "checkpoints", keep=None) as checkpoints:
        step = step if step is not None else checkpoints.latest_step
        if step is None or step not in checkpoints.steps:
            saved = ", ".join(map(str, checkpoints.steps)) or "none"
            raise UserError(f"no checkpoint of step {step} in {path}; there are: {saved}")
        shapes = tree_from_rows(config, lambda row: row.shape(config))
        abstract = jax.tree.map(
            lambda shape, sharding: jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=sharding),
            shapes,
            param_shardings(config, mesh),
            is_leaf=lambda leaf: isinstance(leaf, tuple),
        )
        params = checkpoints.restore_params(step, abstract)
    return RestoredModel(Decoder(config, dtype=jnp.dtype(dtype)), params, files, load_config(path / "config.yaml"))
