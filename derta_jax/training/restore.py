"""What a user calls a model, and its parameters: a Hugging Face directory, hub id or URL, a run, or a PEFT adapter."""

import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from derta_jax.config import RunConfig, load_config
from derta_jax.errors import UserError
from derta_jax.interop.hf_load import check_weights, load_params, read_model_config
from derta_jax.interop.peft import ADAPTER_CONFIG, adapter_base, load_adapter
from derta_jax.interop.source import holds, is_url, local_files
from derta_jax.models.config import ModelConfig
from derta_jax.models.lora import DEFAULT, Adapter, abstract_adapter, merge, target_rows
from derta_jax.models.sharding import abstract_params, check_mesh
from derta_jax.training.checkpoint import Checkpoints, directory_of

RUN_CONFIG_IN_EXPORT = "derta_config.yaml"


@dataclasses.dataclass(frozen=True)
class ModelSource:
    """Where a model lies. `files` is a local directory with config.json and the tokenizer.

    `step` is the checkpoint's, None where it is not ours; `base` is what its adapter goes on, if it is an adapter;
    `run` is the config it was trained with, if we trained it.
    """

    path: str
    files: Path
    config: ModelConfig
    run: RunConfig | None = None
    step: int | None = None
    base: "ModelSource | None" = None

    def check(self) -> None:
        """Raise one `UserError` that lists every tensor that does not fit, before device memory is taken."""
        if self.base is not None:
            self.base.check()
        elif self.step is None:
            check_weights(self.path, self.config)


def is_run(path: str | Path) -> bool:
    """Whether a directory or a URL holds checkpoints."""
    return holds(path, "checkpoints")


def run_checkpoints(source: ModelSource) -> Checkpoints:
    """Those of the run that a model was found in, to read from."""
    return Checkpoints(directory_of(source.path) / "checkpoints", keep=None)


def find_model(path: str | Path, step: int | None = None) -> ModelSource:
    """Look at `path`; of a run's checkpoints take `step`, or the newest. Raises `UserError` when it is no model."""
    if is_run(path):
        return _find_checkpoint(str(path).rstrip("/"), step)
    files = local_files(path)
    if (files / ADAPTER_CONFIG).is_file():
        base = find_model(adapter_base(files))
        return ModelSource(str(files), base.files, base.config, _exported_run(files), base=base)
    if not (files / "config.json").is_file():
        raise UserError(
            f"{path} is no model: neither a Hugging Face directory (config.json) nor an adapter ({ADAPTER_CONFIG}) "
            "nor a run (checkpoints/)"
        )
    return ModelSource(str(path), files, read_model_config(files), _exported_run(files))


def find_files(path: str | Path) -> Path:
    """The local directory with a model's config and tokenizer; its weights are not looked for."""
    if is_run(path):
        return local_files(_model_files(path))
    files = local_files(path)
    return find_files(adapter_base(files)) if (files / ADAPTER_CONFIG).is_file() else files


def load_model(
    source: ModelSource, dtype: str, mesh: Mesh, progress: Callable[[int, int], None] = lambda done, total: None
) -> Any:
    """The parameters in `dtype`, sharded over `mesh`, an adapter merged into them. `progress` is told bytes read."""
    check_mesh(source.config, mesh)
    if source.base is not None:
        params = load_model(source.base, dtype, mesh, progress)
        return merge(source.config, params, adapter_of(source, mesh))
    if source.step is not None:
        with run_checkpoints(source) as checkpoints:
            abstract = {"params": abstract_params(source.config, jnp.dtype(dtype), mesh)}
            return checkpoints.restore_parts(source.step, abstract)["params"]
    return load_params(source.path, source.config, dtype, mesh, progress)


def adapter_of(source: ModelSource, mesh: Mesh) -> Adapter:
    """The float32 adapter of a LoRA run or of a PEFT directory."""
    if source.step is None:
        return load_adapter(source.path, source.config, mesh)
    lora = source.run.lora if source.run else None
    if lora is None:
        raise UserError(f"{source.path} is not a LoRA run")
    abstract = abstract_adapter(source.config, target_rows(source.config, lora.targets), lora.rank, mesh)
    with run_checkpoints(source) as checkpoints:
        parts = checkpoints.restore_parts(source.step, {"lora": {"layers": {DEFAULT: abstract}}})
    return Adapter(parts["lora"]["layers"][DEFAULT], dict.fromkeys(abstract, lora.scale))


def _find_checkpoint(path: str, step: int | None) -> ModelSource:
    files = local_files(_model_files(path))
    source = ModelSource(path, files, read_model_config(files), _trained_run(path))
    with run_checkpoints(source) as checkpoints:
        step = step if step is not None else checkpoints.latest_step
        if step is None or step not in checkpoints.steps:
            saved = ", ".join(map(str, checkpoints.steps)) or "none"
            raise UserError(f"no checkpoint of step {step} in {path}; there are: {saved}")
    base = find_model(source.run.model.path) if source.run and source.run.lora else None
    return dataclasses.replace(source, step=step, base=base)


def _model_files(run: str | Path) -> str:
    return f"{str(run).rstrip('/')}/model"


def _trained_run(path: str) -> RunConfig | None:
    file = directory_of(path) / "config.yaml"
    if not file.exists():
        return None
    if not is_url(path):
        return load_config(Path(file))
    with tempfile.TemporaryDirectory() as directory:
        copied = Path(directory) / file.name
        copied.write_bytes(file.read_bytes())
        return load_config(copied)


def _exported_run(directory: Path) -> RunConfig | None:
    file = directory / RUN_CONFIG_IN_EXPORT
    return load_config(file) if file.is_file() else None
