"""Everything a run needs before its first step, checked in seconds: data, tokenizer, mesh, batches, model."""

import dataclasses
import time
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh
from rich.console import Console
from rich.filesize import decimal

from derta_jax.config import RunConfig
from derta_jax.data.loader import Batches
from derta_jax.data.packing import Layout
from derta_jax.data.pipeline import TrainingRows
from derta_jax.errors import UserError
from derta_jax.interop.tokenizer import Tokenizer, load_tokenizer, refusal_token_id
from derta_jax.models.lora import Adapter, fingerprint
from derta_jax.models.params import count_parameters
from derta_jax.objectives.objective import of_config
from derta_jax.training.held_out import HeldOut
from derta_jax.training.mesh import make_mesh, single_device_mesh
from derta_jax.training.program import BatchShape, Program, check_program, make_program
from derta_jax.training.restore import ModelSource, adapter_of, find_model
from derta_jax.training.rows import shared_rows
from derta_jax.training.watching.sinks import check_wandb
from derta_jax.waiting import waiting

FREE_TO_CHANGE = ("output", "remat", "attention", "unroll", "skip_limit", "compilation_cache")
"""Keys of `train` that a resumed run may have otherwise: they do not change what is learned."""


@dataclasses.dataclass(frozen=True)
class Run:
    """A validated run: nothing here has touched device memory yet."""

    config: RunConfig
    source: ModelSource
    tokenizer: Tokenizer
    refusal_id: int
    data: TrainingRows
    batches: Batches
    program: Program
    held_out: HeldOut | None

    @property
    def output(self) -> epath.Path:
        return epath.Path(self.config.train.output)

    @property
    def mesh(self) -> Mesh:
        return self.program.mesh

    def compile_step(self, console: Console) -> Any:
        """The train step, compiled; says how long that took and what memory a step needs.

        Raises `UserError` where the devices have not as much, as the compiler for TPU knows. What comes back is the
        jitted function, which finds the program in JAX's cache: the program alone refuses arrays of four bits.
        """
        started = time.monotonic()
        with waiting(console, "compiling the train step"):
            try:
                compiled = self.program.lower().compile()
            except jax.errors.JaxRuntimeError as error:
                raise _does_not_fit(error) from error
        memory = compiled.memory_analysis()
        needs = f", a step needs {decimal(memory.peak_memory_in_bytes)} a device" if memory else ""
        console.print(f"compiled  in {time.monotonic() - started:.1f} s{needs}", highlight=False)
        return self.program.step

    @property
    def identity(self) -> dict[str, Any]:
        """What a checkpoint must agree on to be resumed: everything that changes the course of training."""
        config = self.config.model_dump(mode="json")
        dump = {
            **{f"model.{name}": value for name, value in dataclasses.asdict(self.source.config).items()},
            **{f"data.{name}": value for name, value in config["data"].items() if name not in ("path", "packing")},
            **{f"objective.{name}": value for name, value in config["objective"].items() if name != "loss_chunk"},
            **{f"train.{name}": value for name, value in config["train"].items() if name not in FREE_TO_CHANGE},
        }
        if config["lora"]:
            dump |= {f"lora.{name}": value for name, value in config["lora"].items()}
        for name, adapter in self.program.frozen_adapters.items():
            dump[f"frozen_adapters.{name}"] = fingerprint(adapter)
        if self.config.data.packing == "tree":  # which rows are drawn together
            dump["data.packing"] = "tree"
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
    check_program(config, source.config, mesh)
    if config.watch.wandb:
        check_wandb()
    rows_kept = epath.Path(config.train.output) / "rows" if keep_rows else None
    data = shared_rows(config, tokenizer, source.files, rows_kept, console)
    batches = plan_batches(config, data, mesh)
    shape = BatchShape(batches.sequences, batches.length, config.train.accumulation, batches.label_capacity)
    adapters = {name: _frozen_adapter(name, path, source) for name, path in config.frozen_adapters.items()}
    program = make_program(config, source.config, mesh, shape, refusal_id, batches.steps, adapters)
    held_out = None
    if config.held_out is not None:
        look_at = config.model_copy(update={"data": config.data.model_copy(update={"path": config.held_out.path})})
        rows = shared_rows(look_at, tokenizer, source.files, rows_kept, console, name="held-out").rows
        layout = dataclasses.replace(batches.layout, tree=False)
        held_out = HeldOut(config, rows, program.model, refusal_id, layout, mesh)
    return Run(config, source, tokenizer, refusal_id, data, batches, program, held_out)


def _frozen_adapter(name: str, path: str, model: ModelSource) -> Adapter:
    """On the host."""
    source = find_model(path)
    if source.base is None:
        raise UserError(f"frozen_adapters.{name}: {path} is a model of its own; give a PEFT adapter or a LoRA run")
    if source.config != model.config:
        raise UserError(f"frozen_adapters.{name}: {path} goes on a model of another architecture than {model.path}")
    adapter = adapter_of(source, single_device_mesh())
    return Adapter(jax.device_get(adapter.factors), adapter.scales)


def plan_batches(config: RunConfig, data: TrainingRows, mesh: Mesh) -> Batches:
    """The batches of a run, from its config, rows and mesh."""
    train = config.train
    layout = Layout(
        batch_size=train.batch_size,
        sequence_length=train.sequence_length,
        accumulation=train.accumulation,
        shards=mesh.shape["data"] * mesh.shape["fsdp"] * mesh.shape["expert"],
        packed=config.data.packing != "none",
        tree=config.data.packing == "tree",
    )
    objective = of_config(config)
    one_epoch = Batches(data.rows, layout, objective, train.seed, 1, objective.shares).steps_per_epoch
    steps = train.steps or max(1, round((train.epochs or 0) * one_epoch))
    return Batches(data.rows, layout, objective, train.seed, steps, objective.shares)


def _saved_by_trees(batches: Batches) -> str:
    if not batches.layout.tree:
        return ""
    return f" (trees save {batches.trunks.sum() / (batches.lengths + batches.trunks).sum():.1%} of the tokens)"


def describe(run: Run) -> str:
    """What is about to be trained, for people."""
    data, batches = run.data, run.batches
    counts = ", ".join(f"{count:,} {kind}" for kind, count in data.counts.items())
    useful = int(batches.lengths.sum()) / batches.steps_per_epoch
    padded = batches.sequences * batches.length
    cut = sum(row.truncated for row in data.rows)
    model = run.source.config
    lines = [
        f"model     {run.config.model.path}: {model.model_type}, {count_parameters(model):,} parameters, "
        f"refusal token {run.refusal_id} {run.config.objective.refusal_token!r}",
        f"data      {counts} (hash {data.content_hash}) → {len(data.rows):,} rows by {run.config.objective.name}"
        + (f", {cut:,} cut at {run.config.train.sequence_length} tokens" if cut else ""),
        f"batches   {run.config.train.batch_size} rows in {batches.sequences} sequences of {batches.length}, "
        f"{useful / padded:.0%} filled{_saved_by_trees(batches)}; "
        f"{batches.steps_per_epoch:,} steps an epoch, {batches.steps:,} in all",
        f"mesh      {' × '.join(f'{axis} {size}' for axis, size in run.mesh.shape.items())} on "
        f"{jax.devices()[0].device_kind}",
    ]
    if lora := run.config.lora:
        trained = sum(leaf.size for leaf in jax.tree.leaves(run.program.abstract_trainable))
        lines.append(
            f"lora      rank {lora.rank}, alpha {lora.alpha:g}, dropout {lora.dropout:g}: {trained:,} parameters are "
            f"trained, the model's are frozen in {lora.quantise or run.config.train.dtype}"
        )
    if adapters := run.program.frozen_adapters:
        lines.append(f"frozen    adapters that are active and not trained: {', '.join(adapters)}")
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


def _does_not_fit(error: jax.errors.JaxRuntimeError) -> Exception:
    """What to tell of an error of the compiler: that of memory is the user's to mend."""
    if "RESOURCE_EXHAUSTED" not in str(error):
        return error
    return UserError(
        f"a step does not fit the devices' memory: {str(error).splitlines()[0]}\n"
        "train.remat=full or offload, more train.accumulation, mesh.tensor, a lora section, or a larger slice take "
        "less of a device; `derta plan` tries them before anything is rented"
    )
