"""Where logical axes lie on the mesh `("data", "fsdp", "tensor")`: one rule set for parameters and activations."""

from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from derta_jax.errors import UserError
from derta_jax.models.config import ModelConfig
from derta_jax.models.params import parameter_table, tree_from_rows

MESH_AXES = ("data", "fsdp", "tensor")

RULES: dict[str, str | tuple[str, ...] | None] = {
    # parameters
    "layers": None,
    "norm": None,
    "vocab": "tensor",
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "ffn": "tensor",
    # activations
    "batch": ("data", "fsdp"),
    "sequence": None,
    "model": None,
    # the loss: few hidden states on every chip, each chip its own slice of the vocabulary
    "loss_group": "data",
    "loss_vocab": ("fsdp", "tensor"),
}


def partition_spec(axes: tuple[str | None, ...]) -> PartitionSpec:
    """The mesh axes of an array with these logical axes."""
    return PartitionSpec(*(None if axis is None else RULES[axis] for axis in axes))


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Pin an activation to its logical axes; the identity where no mesh is set."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(axes))


def constrain_like_params(config: ModelConfig, tree: Any) -> Any:
    """Pin a tree shaped like the parameters (gradients, updated weights) to the parameters' sharding."""
    return jax.tree.map(lambda row, leaf: constrain(leaf, *row.axes), tree_from_rows(config, lambda row: row), tree)


def mesh_axis_size(logical_axis: str) -> int:
    """Over how many devices of the current mesh a logical axis is split (1 without a mesh)."""
    mesh = jax.sharding.get_abstract_mesh()
    names = RULES[logical_axis] or ()
    size = 1
    for name in (names,) if isinstance(names, str) else names:
        size *= mesh.shape.get(name, 1)
    return size


def param_shardings(config: ModelConfig, mesh: Mesh) -> dict[str, Any]:
    """A tree of `NamedSharding`, one for each parameter."""
    return tree_from_rows(config, lambda row: NamedSharding(mesh, partition_spec(row.axes)))


def check_mesh(config: ModelConfig, mesh: Mesh) -> None:
    """Raise `UserError` naming each model dimension that the mesh cannot split evenly, and the knob to turn."""
    sizes = {
        "heads": config.heads,
        "kv_heads": config.kv_heads,
        **{axis: size for row in parameter_table(config) for axis, size in zip(row.axes, row.shape(config), strict=True)
           if axis not in ("heads", "kv_heads")},
    }  # fmt: skip
    problems = []
    for axis, size in sizes.items():
        knob = RULES[axis]
        if isinstance(knob, str) and size % mesh.shape[knob]:
            problems.append(
                f"  {axis} = {size} does not split over mesh.{knob} = {mesh.shape[knob]}: lower mesh.{knob}"
            )
    if problems:
        raise UserError("the mesh does not fit the model:\n" + "\n".join(problems))
