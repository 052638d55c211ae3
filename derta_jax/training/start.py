"""What a run starts from: the newest whole checkpoint in `train.output` if there is one, else `model.path`."""

from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec
from rich.console import Console

from derta_jax.models.lora import init_adapter, placed
from derta_jax.models.quantise import quantise
from derta_jax.training.checkpoint import Checkpoints
from derta_jax.training.progress import load_with_progress
from derta_jax.training.run import Run
from derta_jax.training.step import TrainState, init_state


def first_state(run: Run, checkpoints: Checkpoints, console: Console) -> TrainState:
    """The state to go on from."""
    state, warnings = checkpoints.restore_newest(run.program.abstract_state, run.identity)
    for warning in warnings:
        console.print(f"warning   {warning}", style="yellow", highlight=False, soft_wrap=True)
    if state is not None:
        step = int(state.step)
        console.print(f"resumed   at step {step:,} of {run.batches.steps:,} from {checkpoints.directory}")
        return state
    return init_state(fresh_trainable(run, console), run.program.optimizer, run.program.shardings)


def fresh_trainable(run: Run, console: Console) -> dict[str, Any]:
    """What is trained, as it is before the first step."""
    if run.config.lora is not None:
        return init_adapter(run.program.abstract_trainable, run.config.train.seed)
    return {"params": load_with_progress(run.source, "float32", run.mesh, console)}


def frozen_variables(run: Run, console: Console) -> dict[str, Any]:
    """What adapters go on, frozen adapters, and the scales of all; nothing where there is no adapter."""
    config, model = run.config, run.source.config
    adapters = {name: placed(model, adapter, run.mesh) for name, adapter in run.program.frozen_adapters.items()}
    frozen = run.program.adapter_collections(adapters)
    for name in frozen.keys() & {"lora_scale"}:
        frozen[name] = jax.device_put(frozen[name], NamedSharding(run.mesh, PartitionSpec()))
    if config.lora is None:
        return frozen
    params = load_with_progress(run.source, config.train.dtype, run.mesh, console)
    base = quantise(model, params, run.mesh) if config.lora.quantise else {"params": params}
    return base | frozen
