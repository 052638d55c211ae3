"""The train step of a config on a mesh, and what it is compiled for: shapes alone; the devices need not exist."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from derta_jax.config import RunConfig
from derta_jax.data.loader import batch_dtypes
from derta_jax.errors import UserError
from derta_jax.models.attention import check_attention
from derta_jax.models.config import ModelConfig
from derta_jax.models.decoder import Decoder
from derta_jax.models.lora import DEFAULT, Adapter, abstract_adapter, adapter_variables, placed, target_rows
from derta_jax.models.quantise import abstract_quantised, check_quantisable
from derta_jax.models.remat import check_remat
from derta_jax.models.sharding import abstract_params, check_mesh
from derta_jax.objectives.objective import objective_loss, of_config
from derta_jax.training.compiler import compiler_options
from derta_jax.training.optimizer import learning_rate_schedule, make_optimizer
from derta_jax.training.step import (
    TrainState,
    batch_sharding,
    make_train_step,
    state_shardings,
    vote_sharding,
)


@dataclasses.dataclass(frozen=True)
class BatchShape:
    """Of a step: `sequences` of `length` tokens over all devices, in `accumulation` micro-batches.

    `label_capacity` is the most labelled tokens of one device of one micro-batch.
    """

    sequences: int
    length: int
    accumulation: int
    label_capacity: int


@dataclasses.dataclass(frozen=True)
class Program:
    """`step` is jitted and not yet compiled; `abstract_trainable` is what it updates, float32, by collection."""

    config: RunConfig
    model: Decoder
    mesh: Mesh
    batch: BatchShape
    optimizer: optax.GradientTransformation
    abstract_trainable: Any
    step: Any
    frozen_adapters: Mapping[str, Adapter]

    @property
    def shardings(self) -> TrainState:
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.abstract_trainable)
        return state_shardings(shardings, self.optimizer, self.mesh)

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
    def abstract_frozen(self) -> dict[str, Any]:
        """Of the collections that no gradient is computed for; none where all parameters are trained, and alone."""
        shapes = jax.eval_shape(lambda: {name: adapter.factors for name, adapter in self.frozen_adapters.items()})
        adapters = {
            name: placed(self.model.config, Adapter(shapes[name], adapter.scales), self.mesh)
            for name, adapter in self.frozen_adapters.items()
        }
        frozen = self.adapter_collections(adapters)
        replicated = NamedSharding(self.mesh, PartitionSpec())
        for name in frozen.keys() & {"lora_scale"}:
            frozen[name] = jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated), frozen[name]
            )
        if (lora := self.config.lora) is None:
            return frozen
        params = abstract_params(self.model.config, jnp.dtype(self.config.train.dtype), self.mesh)
        base = abstract_quantised(self.model.config, params, self.mesh) if lora.quantise else {"params": params}
        return base | frozen

    def adapter_collections(self, frozen: Mapping[str, Adapter]) -> dict[str, Any]:
        """`lora` of the frozen adapters, `lora_scale` of these and of the one that is trained; none without any."""
        adapters = dict(frozen)
        if (lora := self.config.lora) is not None:
            factors = self.abstract_trainable["lora"]["layers"][DEFAULT]
            adapters[DEFAULT] = Adapter(factors, dict.fromkeys(factors, lora.scale))
        if not adapters:
            return {}
        collections = {"lora_scale": adapter_variables(adapters)["lora_scale"]}
        return collections | ({"lora": adapter_variables(frozen)["lora"]} if frozen else {})

    @property
    def stores_reference(self) -> bool:
        """Whether batches bring what the model said before training: beneath an adapter, that model is there."""
        return of_config(self.config).needs_reference and self.config.lora is None

    @property
    def abstract_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        shape = self.batch
        sizes = (shape.accumulation, shape.sequences // shape.accumulation, shape.length)
        sharding = batch_sharding(self.mesh)
        tree = self.config.data.packing == "tree"
        dtypes = batch_dtypes(of_config(self.config), self.stores_reference, tree)
        return {name: jax.ShapeDtypeStruct(sizes, dtype, sharding=sharding) for name, dtype in dtypes.items()}

    def lower(self) -> Any:
        """The step, lowered for the platform of the mesh's devices; `.compile()` makes the program."""
        votes = jax.ShapeDtypeStruct((self.mesh.size,), jnp.int32, sharding=vote_sharding(self.mesh))
        arguments = (self.abstract_state, self.abstract_frozen, self.abstract_batch, votes)
        with jax.set_mesh(self.mesh):
            return self.step.lower(*arguments)


def make_program(
    config: RunConfig,
    model: ModelConfig,
    mesh: Mesh,
    batch: BatchShape,
    refusal_id: int,
    steps: int,
    frozen_adapters: Mapping[str, Adapter] | None = None,
) -> Program:
    """The step of a run of `steps`. Raises `UserError` where config, model and devices do not go together."""
    check_program(config, model, mesh)
    decoder = Decoder(
        model,
        dtype=jnp.dtype(config.train.dtype),
        remat=config.train.remat,
        lora_dropout=config.lora.dropout if config.lora else 0.0,
        attention=config.train.attention,
        unroll=config.train.unroll,
    )
    objective = of_config(config)
    trainable = abstract_trainable(config, model, mesh)
    optimizer = make_optimizer(config.train, steps)
    step = make_train_step(
        objective_loss(objective, decoder, refusal_id, batch.label_capacity),
        optimizer,
        learning_rate_schedule(config.train, steps),
        state_shardings(jax.tree.map(lambda leaf: leaf.sharding, trainable), optimizer, mesh),
        config.train.seed,
        mean_of_means=objective.mean_of_means,
        always_add=mesh.devices.flat[0].platform == "tpu",
        compiler_options=compiler_options(mesh, whole_gradients=config.lora is None),
    )
    return Program(config, decoder, mesh, batch, optimizer, trainable, step, frozen_adapters or {})


def check_program(config: RunConfig, model: ModelConfig, mesh: Mesh) -> None:
    """Raise `UserError` for a mesh that does not split the model, and for knobs that the devices do not have."""
    check_mesh(model, mesh)
    of_config(config).check_model(model)
    if config.lora and config.lora.quantise:
        check_quantisable(model)
    if config.data.packing == "tree":
        check_trees(config, model)
    device = mesh.devices.flat[0]
    check_attention(config.train.attention, device.platform, config.train.dtype, config.train.sequence_length)
    check_remat(config.train.remat, device)


def check_trees(config: RunConfig, model: ModelConfig) -> None:
    """Raise `UserError` for what does not go with `data.packing=tree`."""
    objective, train = of_config(config), config.train
    if objective.shares is not None:
        raise UserError(f"objective {objective.name} draws its streams apart: set data.packing to rows, not to tree")
    window = model.sliding_window
    if window is not None and window < train.sequence_length and train.attention != "xla":
        raise UserError(
            f"train.attention = {train.attention} counts a window's {window:,} tokens by columns, which is wrong in a "
            "tree's branches: set it to xla, or data.packing to rows"
        )


def abstract_trainable(config: RunConfig, model: ModelConfig, mesh: Mesh) -> dict[str, Any]:
    """Float32 shapes and shardings of what the optimizer updates: all parameters, or the adapters alone."""
    if config.lora is None:
        return {"params": abstract_params(model, jnp.float32, mesh)}
    rows = target_rows(model, config.lora.targets)
    return {"lora": {"layers": {DEFAULT: abstract_adapter(model, rows, config.lora.rank, mesh)}}}
