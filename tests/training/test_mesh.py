"""Meshes over one slice and over several. Chips that are not there are stood in for by what a mesh asks of them."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest

from derta_jax.config import MeshShape
from derta_jax.errors import UserError
from derta_jax.models.remat import check_remat
from derta_jax.training.mesh import make_mesh


@dataclasses.dataclass(frozen=True)
class Chip:
    """One of a v5e slice."""

    id: int
    slice_index: int
    process_index: int
    coords: tuple[int, int, int]
    core_on_chip: int = 0
    platform: str = "tpu"
    device_kind: str = "TPU v5 lite"


def slices(count: int, rows: int = 2, columns: int = 4) -> list[Chip]:
    """Chips of so many slices, each of rows × columns."""
    places = [(index, x, y) for index in range(count) for y in range(columns) for x in range(rows)]
    return [Chip(number, index, number // 4, (x, y, 0)) for number, (index, x, y) in enumerate(places)]


def slice_indices(mesh) -> np.ndarray:
    return np.vectorize(lambda chip: chip.slice_index)(mesh.devices)


@pytest.mark.parametrize(
    "shape",
    [MeshShape(data=2), MeshShape(data=4), MeshShape(data=2, fsdp=2, tensor=4), MeshShape(data=8, expert=2)],
    ids=repr,
)
def test_only_data_crosses_from_slice_to_slice(shape):
    mesh = make_mesh(shape, slices(2))
    assert mesh.size == 16
    assert mesh.shape["data"] == shape.data
    assert len({chip.id for chip in mesh.devices.flat}) == 16
    by_data = slice_indices(mesh).reshape(shape.data, -1)
    assert (by_data == by_data[:, :1]).all()
    assert by_data[:, 0].tolist() == sorted(by_data[:, 0].tolist())
    assert set(by_data[:, 0]) == {0, 1}


def test_fsdp_takes_what_a_slice_leaves():
    assert dict(make_mesh(MeshShape(data=4, tensor=2), slices(4)).shape) == {
        "data": 4, "fsdp": 4, "expert": 1, "tensor": 2
    }  # fmt: skip


@pytest.mark.parametrize(("data", "count"), [(1, 2), (3, 2), (2, 4)])
def test_data_that_does_not_reach_all_slices_is_an_error_that_says_what_to_set(data, count):
    with pytest.raises(UserError, match=rf"in {count} slices.*set mesh\.data = {count}, or a multiple.*it is {data}"):
        make_mesh(MeshShape(data=data), slices(count))


def test_a_product_that_is_not_the_number_of_devices_is_an_error_on_slices_too():
    with pytest.raises(UserError, match=r"mesh\.data 2 × mesh\.fsdp 16 .* = 32, but there are 16 devices"):
        make_mesh(MeshShape(data=2, fsdp=16), slices(2))


def test_within_one_slice_the_mesh_is_jaxs_own():
    mine = make_mesh(MeshShape(fsdp=4, tensor=2), slices(1))
    theirs = jax.make_mesh((1, 4, 1, 2), mine.axis_names, axis_types=mine.axis_types, devices=slices(1))
    assert mine == theirs


@pytest.mark.parametrize("tensor", [2, 8])
def test_an_axis_may_lie_along_a_part_of_a_torus_side(tensor):
    places = itertools.product(range(4), range(4), range(4))
    cube = [Chip(number, 0, number // 4, place, device_kind="TPU v5") for number, place in enumerate(places)]
    mesh = make_mesh(MeshShape(tensor=tensor), cube)
    assert dict(mesh.shape) == {"data": 1, "fsdp": 64 // tensor, "expert": 1, "tensor": tensor}
    for group in mesh.devices.reshape(-1, tensor):
        corners = np.array([chip.coords for chip in group])
        assert np.prod(corners.max(0) - corners.min(0) + 1) == tensor  # they fill a box


class MemoryOfItsOwn:
    """A device that reaches no memory of its host."""

    device_kind = "island"

    def addressable_memories(self):
        return [memory for memory in jax.devices()[0].addressable_memories() if memory.kind == "device"]


def test_offloading_where_the_host_is_out_of_reach_is_an_error_that_says_what_to_set():
    check_remat("offload", jax.devices()[0])
    check_remat("attention", MemoryOfItsOwn())
    with pytest.raises(UserError, match=r"train\.remat = offload .* island devices do not reach: set it to full"):
        check_remat("offload", MemoryOfItsOwn())
