"""The device mesh `("data", "fsdp", "expert", "tensor")` of a run."""

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from derta_jax.config import MeshShape
from derta_jax.errors import UserError
from derta_jax.models.sharding import MESH_AXES


def make_mesh(shape: MeshShape) -> Mesh:
    """A mesh over all devices of all processes; `fsdp: -1` takes those that the other axes leave.

    Raises `UserError` when the product is not the number of devices.
    """
    devices = jax.device_count()
    others = shape.data * shape.expert * shape.tensor
    fsdp = shape.fsdp if shape.fsdp > 0 else max(1, devices // others)
    sizes = (shape.data, fsdp, shape.expert, shape.tensor)
    if others * fsdp != devices:
        product = " × ".join(f"mesh.{axis} {size}" for axis, size in zip(MESH_AXES, sizes, strict=True))
        raise UserError(f"{product} = {others * fsdp}, but there are {devices} devices")
    return jax.make_mesh(sizes, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def single_device_mesh() -> Mesh:
    """A mesh of the first local device, for evaluation on one chip."""
    devices = np.array(jax.local_devices()[:1]).reshape([1] * len(MESH_AXES))
    return Mesh(devices, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))
