"""Where logical axes lie on the mesh `("data", "fsdp", "expert", "tensor")`, for parameters and activations."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from derta_jax.errors import UserError
from derta_jax.models.config import ModelConfig
from derta_jax.models.params import Parameter, parameter_table, tree_from_rows

MESH_AXES = ("data", "fsdp", "expert", "tensor")

RULES: dict[str, str | tuple[str, ...] | None] = {
    # parameters
    "layers": None,
    "norm": None,
    "head_norm": None,
    "vocab": "tensor",
    "embed": ("fsdp", "expert"),
    "heads": "tensor",
    "kv_heads": "tensor",
    "ffn": "tensor",
    "experts": "expert",
    "expert_embed": "fsdp",
    "router": None,
    # adapters: the long side over all devices of a data group
    "lora": ("fsdp", "expert", "tensor"),
    "expert_lora": ("fsdp", "tensor"),
    "rank": None,
    # activations
    "batch": ("data", "fsdp", "expert"),
    "sequence": None,
    "model": None,
    # the loss: few hidden states on every chip, each chip its own slice of the vocabulary
    "loss_group": "data",
    "loss_tokens": ("fsdp", "expert"),
    "loss_vocab": ("fsdp", "expert", "tensor"),
}

GATHERED = ("embed", "loss_tokens")
"""Axes whose parts are put together where they are needed."""


def partition_spec(axes: tuple[str | None, ...]) -> PartitionSpec:
    """The mesh axes of an array with these logical axes."""
    return PartitionSpec(*(None if axis is None else RULES[axis] for axis in axes))


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Pin an activation to its logical axes; the identity where no mesh is set."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(axes))


def gathered(array: jax.Array, *axes: str | None) -> jax.Array:
    """A layer's weight, or a chunk of the loss's tokens, with the parts along `fsdp` and `expert` put together.

    Said here, in the compute dtype, so that what is small travels and not what it is multiplied with, once for all that
    read it. An expert's weights are left to the mixture.
    """
    if "experts" in axes:
        return array
    return constrain(array, *(None if axis in GATHERED else axis for axis in axes))


def mesh_axes(logical_axis: str) -> tuple[str, ...]:
    """The mesh axes over which a logical axis is split."""
    names = RULES[logical_axis] or ()
    return (names,) if isinstance(names, str) else names


def mesh_axis_size(logical_axis: str) -> int:
    """Over how many devices of the current mesh a logical axis is split (1 without a mesh)."""
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape.get(name, 1) for name in mesh_axes(logical_axis))


def param_shardings(config: ModelConfig, mesh: Mesh) -> dict[str, Any]:
    """A tree of `NamedSharding`, one for each parameter."""
    return tree_from_rows(config, lambda row: NamedSharding(mesh, partition_spec(row.axes)))


def abstract_params(config: ModelConfig, dtype: Any, mesh: Mesh) -> dict[str, Any]:
    """The parameters' shapes and shardings."""

    def leaf(row: Parameter) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(
            row.shape(config), jnp.dtype(dtype), sharding=NamedSharding(mesh, partition_spec(row.axes))
        )

    return tree_from_rows(config, leaf)


def check_mesh(config: ModelConfig, mesh: Mesh) -> None:
    """Raise `UserError` naming each model dimension that the mesh cannot split evenly, and the knob to turn."""
    sizes: dict[str, int] = {}
    for row in parameter_table(config):
        sizes |= zip(row.axes, row.shape(config), strict=True)
    sizes |= {"heads": config.heads, "kv_heads": config.kv_heads}
    problems = []
    if (experts := mesh.shape["expert"]) > 1 and not config.experts:
        problems.append(f"  mesh.expert = {experts}, but a {config.model_type} has no experts: use mesh.fsdp")
    for axis, size in sizes.items():
        knobs = [f"mesh.{name}" for name in mesh_axes(axis) if mesh.shape[name] > 1]
        devices = math.prod(mesh.shape[name] for name in mesh_axes(axis))
        if size % devices:
            product = " × ".join(knobs)
            problems.append(f"  {axis} = {size} does not split over {product} = {devices}: lower {' or '.join(knobs)}")
    if problems:
        raise UserError("the mesh does not fit the model:\n" + "\n".join(problems))
