"""Everything a run needs before its first step, checked in seconds: data, tokenizer, mesh, batches, model."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from rich.console import Console
from rich.progress import Progress

from derta_jax.config import RunConfig
from derta_jax.data.dataset import load_dataset
from derta_jax.data.loader import Batches
from derta_jax.data.packing import Layout
from derta_jax.data.pipeline import TrainingRows, training_rows
from derta_jax.interop.tokenizer import Tokenizer, load_tokenizer, refusal_token_id
from derta_jax.models.config import ModelConfig
from derta_jax.models.decoder import Decoder
from derta_jax.models.lora import DEFAULT, abstract_adapter, target_rows
from derta_jax.models.params import count_parameters
from derta_jax.models.quantise import check_quantisable
from derta_jax.models.sharding import abstract_params, check_mesh
from derta_jax.objectives.derta import derta_loss
from derta_jax.training.mesh import make_mesh
from derta_jax.training.optimizer import make_optimizer
from derta_jax.training.restore import ModelSource, find_model
from derta_jax.training.step import TrainState, make_train_step, state_shardings


@dataclasses.dataclass(frozen=True)
class Run:
    """A validated run: nothing here has touched device memory yet."""

    config: RunConfig
    source: ModelSource
    tokenizer: Tokenizer
    refusal_id: int
    model: Decoder
    mesh: Mesh
    data: TrainingRows
    batches: Batches
    optimizer: optax.GradientTransformation
    abstract_trainable: Any
    train_step: Any

    @property
    def output(self) -> Path:
        return Path(self.config.train.output)

    @property
    def abstract_state(self) -> TrainState:
        """Shapes, dtypes and shardings of the train state."""

        def init(trainable: Any) -> TrainState:
            return TrainState(jnp.zeros((), jnp.int32), trainable, self.optimizer.init(trainable))

        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            jax.eval_shape(init, self.abstract_trainable),
            self.shardings,
        )

    @property
    def shardings(self) -> TrainState:
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.abstract_trainable)
        return state_shardings(shardings, self.optimizer, self.mesh)

    @property
    def identity(self) -> dict[str, Any]:
        """What a checkpoint must agree on to be resumed: everything that changes the course of training."""
        config = self.config.model_dump(mode="json")
        dump = {
            **{f"model.{name}": value for name, value in dataclasses.asdict(self.model.config).items()},
            **{f"data.{name}": value for name, value in config["data"].items() if name not in ("path", "packing")},
            **{f"objective.{name}": value for name, value in config["objective"].items() if name != "loss_chunk"},
            **{f"train.{name}": value for name, value in config["train"].items() if name not in ("output", "remat")},
        }
        if config["lora"]:
            dump |= {f"lora.{name}": value for name, value in config["lora"].items()}
        return dump | {"data.content_hash": self.data.dataset.content_hash}


def prepare_run(config: RunConfig, console: Console) -> Run:
    """Check and assemble a run. Raises `UserError` for whatever would fail later."""
    source = find_model(config.model.path)
    source.check()
    dataset = load_dataset(config.data.path)
    tokenizer = load_tokenizer(source.files)
    refusal_id = refusal_token_id(tokenizer, config.objective.refusal_token)
    mesh = make_mesh(config.mesh)
    check_mesh(source.config, mesh)
    if config.lora and config.lora.quantise:
        check_quantisable(source.config)
    trainable = abstract_trainable(config, source.config, mesh)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("tokenise", total=None)
        data = training_rows(dataset, config, tokenizer, lambda count: bar.update(task, completed=count))
    batches = plan_batches(config, data, mesh)
    model = Decoder(
        source.config,
        dtype=jnp.dtype(config.train.dtype),
        remat=config.train.remat,
        lora_dropout=config.lora.dropout if config.lora else 0.0,
    )
    optimizer = make_optimizer(config.train, batches.steps)
    shardings = state_shardings(jax.tree.map(lambda leaf: leaf.sharding, trainable), optimizer, mesh)
    loss = derta_loss(model, config.objective, refusal_id, batches.label_capacity)
    step = make_train_step(loss, optimizer, shardings, config.train.seed, mean_of_means=config.objective.paper)
    return Run(config, source, tokenizer, refusal_id, model, mesh, data, batches, optimizer, trainable, step)


def abstract_trainable(config: RunConfig, model: ModelConfig, mesh: Mesh) -> dict[str, Any]:
    """Float32 shapes and shardings of what the optimizer updates: all parameters, or the adapters alone."""
    if config.lora is None:
        return {"params": abstract_params(model, jnp.float32, mesh)}
    rows = target_rows(model, config.lora.targets)
    return {"lora": {"layers": {DEFAULT: abstract_adapter(model, rows, config.lora.rank, mesh)}}}


def plan_batches(config: RunConfig, data: TrainingRows, mesh: Mesh) -> Batches:
    """The batches of a run, from its config, rows and mesh."""
    train = config.train
    layout = Layout(
        batch_size=train.batch_size,
        sequence_length=train.sequence_length,
        accumulation=train.accumulation,
        shards=mesh.shape["data"] * mesh.shape["fsdp"] * mesh.shape["expert"],
        groups=mesh.shape["data"],
        packed=config.data.packing == "rows",
    )
    one_epoch = Batches(data.rows, layout, config.objective, train.seed, steps=1).steps_per_epoch
    steps = train.steps or max(1, round((train.epochs or 0) * one_epoch))
    return Batches(data.rows, layout, config.objective, train.seed, steps)


def describe(run: Run) -> str:
    """What is about to be trained, for people."""
    data, batches = run.data, run.batches
    counts = ", ".join(f"{count:,} {kind}" for kind, count in data.dataset.counts.items())
    useful = sum(len(row) for row in data.rows) / batches.steps_per_epoch
    padded = batches.sequences * run.config.train.sequence_length
    cut = sum(row.truncated for row in data.rows)
    model = run.model.config
    lines = [
        f"model     {run.config.model.path}: {model.model_type}, {count_parameters(model):,} parameters, "
        f"refusal token {run.refusal_id} {run.config.objective.refusal_token!r}",
        f"data      {counts} (hash {data.dataset.content_hash}) → {len(data.rows):,} rows by {run.config.data.recipe}"
        + (f", {cut:,} cut at {run.config.train.sequence_length} tokens" if cut else ""),
        f"batches   {run.config.train.batch_size} rows in {batches.sequences} sequences of "
        f"{run.config.train.sequence_length}, {useful / padded:.0%} filled; "
        f"{batches.steps_per_epoch:,} steps an epoch, {batches.steps:,} in all",
        f"mesh      {' × '.join(f'{axis} {size}' for axis, size in run.mesh.shape.items())} on "
        f"{jax.devices()[0].device_kind}",
    ]
    if lora := run.config.lora:
        trained = sum(leaf.size for leaf in jax.tree.leaves(run.abstract_trainable))
        lines.append(
            f"lora      rank {lora.rank}, alpha {lora.alpha:g}, dropout {lora.dropout:g}: {trained:,} parameters are "
            f"trained, the model's are frozen in {lora.quantise or run.config.train.dtype}"
        )
    if model.experts:
        lines.append(
            f"experts   {model.experts_per_token} of {model.experts} for each token, none dropped; load-balancing loss "
            f"× {run.config.objective.router_aux_weight:g} (config.json: {model.router_aux_coef:g})"
        )
    if data.unlabelled:
        ids = ", ".join(row.id for row in data.unlabelled[:5])
        lines.append(f"dropped   {len(data.unlabelled):,} rows that have no label left after cutting: {ids}")
    return "\n".join(lines)
