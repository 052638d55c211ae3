"""Everything a run needs before its first step, checked in seconds: data, tokenizer, mesh, batches, model."""

import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp
import optax
from etils import epath
from jax.sharding import Mesh
from rich.console import Console
from rich.filesize import decimal

from derta_jax.config import RunConfig
from derta_jax.data.loader import Batches
from derta_jax.data.packing import Layout
from derta_jax.data.pipeline import TrainingRows
from derta_jax.interop.tokenizer import Tokenizer, load_tokenizer, refusal_token_id
from derta_jax.models.attention import check_attention
from derta_jax.models.config import ModelConfig
from derta_jax.models.decoder import Decoder
from derta_jax.models.lora import DEFAULT, abstract_adapter, target_rows
from derta_jax.models.params import count_parameters
from derta_jax.models.quantise import check_quantisable
from derta_jax.models.remat import check_remat
from derta_jax.models.sharding import abstract_params, check_mesh
from derta_jax.objectives.derta import derta_loss
from derta_jax.training.held_out import HeldOut
from derta_jax.training.mesh import make_mesh
from derta_jax.training.optimizer import learning_rate_schedule, make_optimizer
from derta_jax.training.restore import ModelSource, find_model
from derta_jax.training.rows import shared_rows
from derta_jax.training.step import GO_ON, TrainState, batch_sharding, cast_votes, make_train_step, state_shardings
from derta_jax.training.watching.sinks import check_wandb

FREE_TO_CHANGE = ("output", "remat", "attention", "skip_limit", "compilation_cache")
"""Keys of `train` that a resumed run may have otherwise: they do not change what is learned."""


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
    held_out: HeldOut | None

    @property
    def output(self) -> epath.Path:
        return epath.Path(self.config.train.output)

    def compile_step(self, state: TrainState, frozen: Any, console: Console) -> Any:
        """The train step, compiled for these variables; says how long that took and what memory a step needs.

        What comes back is the jitted function, which finds the program in JAX's cache: the program alone refuses arrays
        of four bits.
        """
        started = time.monotonic()
        sharding = batch_sharding(self.mesh)
        batch = {
            name: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)
            for name, array in self.batches[0].items()
        }
        with jax.set_mesh(self.mesh), console.status("compiling the train step"):
            program = self.train_step.lower(state, frozen, batch, cast_votes(GO_ON, self.mesh)).compile()
        memory = program.memory_analysis()
        needs = f", a step needs {decimal(memory.peak_memory_in_bytes)} a device" if memory else ""
        console.print(f"compiled  in {time.monotonic() - started:.1f} s{needs}", highlight=False)
        return self.train_step

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
            **{f"train.{name}": value for name, value in config["train"].items() if name not in FREE_TO_CHANGE},
        }
        if config["lora"]:
            dump |= {f"lora.{name}": value for name, value in config["lora"].items()}
        return dump | {"data.content_hash": self.data.content_hash}


def prepare_run(config: RunConfig, console: Console, keep_rows: bool = True) -> Run:
    """Check and assemble a run; all processes call it. Raises `UserError` for whatever would fail later.

    The tokenised rows are kept in `rows/` of the run directory, unless `keep_rows` is false.
    """
    source = find_model(config.model.path)
    source.check()
    tokenizer = load_tokenizer(source.files)
    refusal_id = refusal_token_id(tokenizer, config.objective.refusal_token)
    mesh = make_mesh(config.mesh)
    check_mesh(source.config, mesh)
    if config.lora and config.lora.quantise:
        check_quantisable(source.config)
    if config.watch.wandb:
        check_wandb()
    device = mesh.local_devices[0]
    check_attention(config.train.attention, device.platform, config.train.dtype, config.train.sequence_length)
    check_remat(config.train.remat, device)
    trainable = abstract_trainable(config, source.config, mesh)
    rows_kept = epath.Path(config.train.output) / "rows" if keep_rows else None
    data = shared_rows(config, tokenizer, source.files, rows_kept, console)
    batches = plan_batches(config, data, mesh)
    model = Decoder(
        source.config,
        dtype=jnp.dtype(config.train.dtype),
        remat=config.train.remat,
        lora_dropout=config.lora.dropout if config.lora else 0.0,
        attention=config.train.attention,
    )
    optimizer = make_optimizer(config.train, batches.steps)
    shardings = state_shardings(jax.tree.map(lambda leaf: leaf.sharding, trainable), optimizer, mesh)
    loss = derta_loss(model, config.objective, refusal_id, batches.label_capacity)
    schedule = learning_rate_schedule(config.train, batches.steps)
    step = make_train_step(
        loss, optimizer, schedule, shardings, config.train.seed, mean_of_means=config.objective.paper
    )
    held_out = None
    if config.held_out is not None:
        look_at = config.model_copy(update={"data": config.data.model_copy(update={"path": config.held_out.path})})
        rows = shared_rows(look_at, tokenizer, source.files, rows_kept, console, name="held-out").rows
        held_out = HeldOut(config, rows, model, refusal_id, batches.layout, mesh)
    return Run(config, source, tokenizer, refusal_id, model, mesh, data, batches, optimizer, trainable, step, held_out)


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
    counts = ", ".join(f"{count:,} {kind}" for kind, count in data.counts.items())
    useful = sum(len(row) for row in data.rows) / batches.steps_per_epoch
    padded = batches.sequences * run.config.train.sequence_length
    cut = sum(row.truncated for row in data.rows)
    model = run.model.config
    lines = [
        f"model     {run.config.model.path}: {model.model_type}, {count_parameters(model):,} parameters, "
        f"refusal token {run.refusal_id} {run.config.objective.refusal_token!r}",
        f"data      {counts} (hash {data.content_hash}) → {len(data.rows):,} rows by {run.config.data.recipe}"
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
    if run.held_out is not None:
        looks = run.held_out.batches
        lines.append(f"held out  {len(looks.rows):,} rows in {looks.steps:,} batches")
    if data.unlabelled:
        ids = ", ".join(row.id for row in data.unlabelled[:5])
        lines.append(f"dropped   {len(data.unlabelled):,} rows that have no label left after cutting: {ids}")
    return "\n".join(lines)
