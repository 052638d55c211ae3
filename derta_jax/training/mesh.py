"""The device mesh `("data", "fsdp", "expert", "tensor")` of a run."""

from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental.mesh_utils import create_device_mesh, create_hybrid_device_mesh
from jax.sharding import AxisType, Mesh

from derta_jax.config import MeshShape
from derta_jax.errors import UserError
from derta_jax.models.sharding import MESH_AXES


def make_mesh(shape: MeshShape, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over all devices of all processes, or over those given; `fsdp: -1` takes those that other axes leave.

    Where the devices are of several slices, `data` goes over the network between them, and all other axes stay inside
    of a slice. Raises `UserError` when the product is not the number of devices, or `data` no multiple of the slices.
    """
    devices = jax.devices() if devices is None else devices
    others = shape.data * shape.expert * shape.tensor
    fsdp = shape.fsdp if shape.fsdp > 0 else max(1, len(devices) // others)
    sizes = (shape.data, fsdp, shape.expert, shape.tensor)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if shape.data % slices:
        raise UserError(
            f"the {len(devices)} devices are in {slices} slices, and only mesh.data reaches from one to the next: "
            f"set mesh.data = {slices}, or a multiple of it (it is {shape.data})"
        )
    if others * fsdp != len(devices):
        product = " × ".join(f"mesh.{axis} {size}" for axis, size in zip(MESH_AXES, sizes, strict=True))
        raise UserError(f"{product} = {others * fsdp}, but there are {len(devices)} devices")
    # an axis that no sides of the torus multiply to, as 2 of 4x4x4, lies along a part of one
    if slices == 1:
        grid = create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    else:
        inside, between = (shape.data // slices, *sizes[1:]), (slices, 1, 1, 1)
        grid = create_hybrid_device_mesh(inside, between, devices, allow_split_physical_axes=True)
    return Mesh(grid, MESH_AXES, axis_types=_axis_types())


def single_device_mesh() -> Mesh:
    """A mesh of the first local device, for evaluation on one chip."""
    devices = np.array(jax.local_devices()[:1]).reshape([1] * len(MESH_AXES))
    return Mesh(devices, MESH_AXES, axis_types=_axis_types())


def _axis_types() -> tuple[AxisType, ...]:
    return (AxisType.Auto,) * len(MESH_AXES)
