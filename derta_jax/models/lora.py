"""Low-rank adapters (Hu et al., arXiv 2106.09685): W x becomes W x + alpha / rank · B A dropout(x).

Adapters are variables of their own, beside the frozen parameters, under any number of names:

    {"params": …, "lora": {"layers": {NAME: {"query": {"a": [L, D, R], "b": [L, R, H·h]}, …}}},
     "lora_scale": {"layers": {NAME: {"query": scalar, …}}}}

A scale is data: setting it to 0 switches an adapter off without compiling anything again. Experts' factors have an
expert axis behind the layers: a [L, E, D, R], b [L, E, R, F].
"""

import functools
import hashlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh, NamedSharding, Sharding, SingleDeviceSharding

from derta_jax.errors import UserError, did_you_mean
from derta_jax.models.config import ModelConfig
from derta_jax.models.params import Parameter, parameter_table
from derta_jax.models.sharding import partition_spec

DEFAULT = "default"
"""The name of an adapter that nobody named: the one that is trained."""


class Adapter(NamedTuple):
    """One adapter of a model, by row name: its factors `{"query": {"a", "b"}, …}` and their scales alpha / rank."""

    factors: Mapping[str, Any]
    scales: Mapping[str, float]


class LowRank(NamedTuple):
    """One adapter of one weight inside one layer: a […, in, R], b […, R, out] with the scale in it.

    `keep` says which entries of the input an adapter sees (dropout); None: all.
    """

    a: jax.Array
    b: jax.Array
    keep: jax.Array | None

    def dropped(self, x: jax.Array) -> jax.Array:
        return x if self.keep is None else jnp.where(self.keep, x, 0)


def low_rank(module: nn.Module, name: str, input_shape: tuple[int, ...], dtype: Any, rate: float) -> list[LowRank]:
    """The adapters of `module`'s weight `name`; where there is a `dropout` stream, at `rate` for the trained one."""
    found = []
    for adapter, targets in module.variables.get("lora", {}).items():
        if name in targets:
            scale = module.variables["lora_scale"][adapter][name]
            keep = None
            if rate and adapter == DEFAULT and module.has_rng("dropout"):
                keep = jax.random.bernoulli(module.make_rng("dropout"), 1 - rate, input_shape)
                # drawn once: XLA:TPU would draw it anew for each tile of each product that reads it
                keep = jax.lax.optimization_barrier(keep)
                scale = scale / (1 - rate)
            factors = targets[name]
            found.append(LowRank(factors["a"].astype(dtype), (factors["b"] * scale).astype(dtype), keep))
    return found


def target_rows(config: ModelConfig, targets: Sequence[str] | None = None) -> tuple[Parameter, ...]:
    """The table's rows that adapters go on; `targets` are Hugging Face's module names, None for all there are.

    Raises `UserError` naming each target that there is not.
    """
    rows = {row.hf_module: row for row in parameter_table(config) if row.lora}
    unknown = [name for name in targets or () if name not in rows]
    if unknown:
        lines = [f"  {name}{did_you_mean(name, rows)}" for name in unknown]
        raise UserError(
            f"lora.targets that a {config.model_type} does not have (it has {', '.join(rows)}):\n" + "\n".join(lines)
        )
    return tuple(row for name, row in rows.items() if targets is None or name in targets)


def factor_axes(row: Parameter) -> dict[str, tuple[str, ...]]:
    """Logical axes of the two factors: the long side lies over all devices, or B would be whole on each of them."""
    *stack, _, _ = row.axes
    long = "expert_lora" if "experts" in stack else "lora"
    return {"a": (*stack, long, "rank"), "b": (*stack, "rank", long)}


def factor_sharding(row: Parameter, factor: str, mesh: Mesh | None) -> Sharding:
    """Where a row's factor `a` or `b` lies; on the first device without a mesh."""
    if mesh is None:
        return SingleDeviceSharding(jax.local_devices()[0])
    return NamedSharding(mesh, partition_spec(factor_axes(row)[factor]))


def factor_shapes(config: ModelConfig, row: Parameter, rank: int) -> dict[str, tuple[int, ...]]:
    """a [L, (E,) in, R] and b [L, (E,) R, out]."""
    *stack, inputs, outputs = row.shape(config)
    return {"a": (*stack, inputs, rank), "b": (*stack, rank, outputs)}


def abstract_adapter(config: ModelConfig, rows: Sequence[Parameter], rank: int, mesh: Mesh) -> dict[str, Any]:
    """The float32 shapes and shardings of one adapter's factors: `{"query": {"a", "b"}, …}`.

    Raises `UserError` where a factor does not split over the mesh.
    """

    def leaf(row: Parameter, factor: str) -> jax.ShapeDtypeStruct:
        shape = factor_shapes(config, row, rank)[factor]
        sharding = factor_sharding(row, factor, mesh)
        try:
            sharding.shard_shape(shape)
        except ValueError as error:
            raise UserError(
                f"the adapter of {row.hf_module} has a side of {max(shape[-2:])}, which does not split over the "
                f"{mesh.size} devices of the mesh: use more of mesh.data"
            ) from error
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)

    return {row.name: {factor: leaf(row, factor) for factor in ("a", "b")} for row in rows}


def init_adapter(abstract: Any, seed: int) -> Any:
    """A new adapter: A uniform in ±1/√in as PEFT draws it, B zero, so that the model is what it was."""

    def init() -> Any:
        flat = traverse_util.flatten_dict(abstract)
        key = jax.random.key(seed)
        fresh = {}
        for number, (path, leaf) in enumerate(sorted(flat.items())):
            if path[-1] == "a":
                bound = leaf.shape[-2] ** -0.5
                fresh[path] = jax.random.uniform(jax.random.fold_in(key, number), leaf.shape, leaf.dtype, -bound, bound)
            else:
                fresh[path] = jnp.zeros(leaf.shape, leaf.dtype)
        return traverse_util.unflatten_dict(fresh)

    return jax.jit(init, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, abstract))()


def adapter_variables(adapters: Mapping[str, Adapter]) -> dict[str, Any]:
    """The `lora` and `lora_scale` collections of named adapters, all of them switched on."""
    return {
        "lora": {"layers": {name: dict(adapter.factors) for name, adapter in adapters.items()}},
        "lora_scale": {"layers": {name: _scalars(adapter.scales) for name, adapter in adapters.items()}},
    }


def joined(frozen: Mapping[str, Any], trainable: Mapping[str, Any]) -> dict[str, Any]:
    """All collections of a model, of which each may hold some adapters."""
    both = {**frozen, **trainable}
    if "lora" in frozen and "lora" in trainable:
        both["lora"] = {"layers": {**frozen["lora"]["layers"], **trainable["lora"]["layers"]}}
    return both


def placed(config: ModelConfig, adapter: Adapter, mesh: Mesh) -> Adapter:
    """The adapter on a mesh; of shapes alone if its factors are."""
    rows = {row.name: row for row in target_rows(config)}

    def place(name: str, factor: str, array: Any) -> Any:
        sharding = factor_sharding(rows[name], factor, mesh)
        if isinstance(array, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    factors = {
        name: {factor: place(name, factor, array) for factor, array in pair.items()}
        for name, pair in adapter.factors.items()
    }
    return Adapter(factors, adapter.scales)


def fingerprint(adapter: Adapter) -> str:
    """16 hex digits that differ where any bit of the factors or a scale does; they must be on the host."""
    digest = hashlib.sha256()
    for name, pair in sorted(adapter.factors.items()):
        digest.update(f"{name} {adapter.scales[name]!r}".encode())
        for factor, array in sorted(pair.items()):
            digest.update(f"{factor} {array.shape}".encode() + np.asarray(array).tobytes())
    return digest.hexdigest()[:16]


def switched(variables: Mapping[str, Any], on: Collection[str]) -> dict[str, Any]:
    """The same variables with the adapters named in `on` switched on and all others off; compiles nothing anew."""
    scales = {
        name: targets if name in on else jax.tree.map(jnp.zeros_like, targets)
        for name, targets in variables["lora_scale"]["layers"].items()
    }
    return {**variables, "lora_scale": {"layers": scales}}


def merge(config: ModelConfig, params: Any, adapter: Adapter) -> Any:
    """Parameters with W + scale · A B in place of W, summed in float32 and kept in W's dtype; W's memory is reused."""
    flat = traverse_util.flatten_dict(params, sep="/")
    for row in target_rows(config):
        if row.name in adapter.factors:
            factors = adapter.factors[row.name]
            flat[row.path] = _merged(flat[row.path], factors["a"], factors["b"], adapter.scales[row.name])
    return traverse_util.unflatten_dict(flat, sep="/")


@functools.partial(jax.jit, donate_argnums=0)
def _merged(weight: jax.Array, a: jax.Array, b: jax.Array, scale: float) -> jax.Array:
    """One layer at a time, so that the float32 product of all layers never exists."""

    def one_layer(factors: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        weight, a, b = factors
        delta = jnp.matmul(a.astype(jnp.float32), b.astype(jnp.float32), precision="highest")
        return (weight.astype(jnp.float32) + scale * delta).astype(weight.dtype)

    return jax.lax.map(one_layer, (weight, a, b))


def _scalars(scales: Mapping[str, float]) -> dict[str, jax.Array]:
    return {name: jnp.float32(scale) for name, scale in scales.items()}
