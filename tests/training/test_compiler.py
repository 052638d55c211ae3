"""What XLA is told for a kind of device, and that it makes a difference there."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from derta_jax.config import MeshShape
from derta_jax.planning.hlo_cost import Collective, program_cost
from derta_jax.planning.slices import GENERATIONS, SLICES, find_slice
from derta_jax.training.compiler import BY_DEVICE_KIND, BY_PLATFORM, REDUCTIONS_BESIDE_PRODUCTS, compiler_options
from derta_jax.training.mesh import make_mesh


def mesh_of(name):
    return make_mesh(MeshShape(), find_slice(name).devices())


def smallest(family):
    return mesh_of(next(place.name for place in SLICES.values() if place.family == family))


def cost_of(function, *arguments, mesh, options, **jit):
    with jax.set_mesh(mesh):
        compiled = jax.jit(function, compiler_options=options, **jit).lower(*arguments).compile()
    return program_cost(compiled.as_text() or "")


def cycles_of_a_product(mesh, options):
    """Out of the feed-forward layers of LLaMA 3 70B, for 4,096 tokens, on every chip."""
    place = NamedSharding(mesh, PartitionSpec())
    x, weight = (jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=place) for shape in ((4096, 28672), (28672, 8192)))
    return cost_of(jnp.matmul, x, weight, mesh=mesh, options=options).estimated_cycles


def collectives_of_gradients(mesh, options, width, products) -> dict[str, Collective]:
    """Of two layers of so many products each, weights and batch split over all chips: gathers, then reductions."""
    sharding = functools.partial(NamedSharding, mesh)

    def loss(weights, x):
        def layer(x, weights):
            for weight in weights:
                x = jnp.tanh(x @ jax.lax.with_sharding_constraint(weight, sharding(PartitionSpec())))
            return x, None

        return jax.lax.scan(layer, x, weights)[0].sum(dtype=jnp.float32)

    split = sharding(PartitionSpec(None, None, "fsdp"))
    weights = jax.ShapeDtypeStruct((2, products, width, width), jnp.bfloat16, sharding=split)
    x = jax.ShapeDtypeStruct((4096, width), jnp.bfloat16, sharding=sharding(PartitionSpec("fsdp")))
    return cost_of(jax.grad(loss), weights, x, mesh=mesh, options=options, out_shardings=split).collectives


def test_every_generation_is_known_by_the_name_of_its_devices(tpu_compiler):
    assert {smallest(family).devices.flat[0].device_kind for family in GENERATIONS} == set(BY_DEVICE_KIND)


def test_a_mesh_has_the_options_of_its_platform_and_of_its_kind_of_device(tpu_compiler):
    v5p, cpu = mesh_of("v5p-8"), make_mesh(MeshShape(), jax.devices("cpu"))
    assert compiler_options(v5p) == BY_PLATFORM["tpu"] | BY_DEVICE_KIND["TPU v5"]
    assert compiler_options(cpu) == compiler_options(cpu, whole_gradients=True) == BY_PLATFORM["cpu"]


def test_reductions_run_beside_products_where_there_is_room_for_them(tpu_compiler):
    v4, v5p = mesh_of("v4-8"), mesh_of("v5p-8")
    assert compiler_options(v5p, whole_gradients=True) == compiler_options(v5p) | REDUCTIONS_BESIDE_PRODUCTS
    assert compiler_options(v4, whole_gradients=True) == compiler_options(v4)


@pytest.mark.parametrize("family", ["v5e", "v5p"])
def test_with_larger_tiles_a_product_takes_fewer_cycles(family, tpu_compiler):
    mesh = smallest(family)
    assert cycles_of_a_product(mesh, compiler_options(mesh)) < cycles_of_a_product(mesh, BY_PLATFORM["tpu"])


@pytest.mark.parametrize("name", ["v4-8", "v5e-4", "v5p-8", "v6e-16"])
def test_weights_are_gathered_beside_the_products_before_them(name, tpu_compiler):
    mesh = mesh_of(name)
    found = collectives_of_gradients(mesh, compiler_options(mesh), width=1024, products=2)["all-gather"]
    assert found.exposed == found.bytes / 2  # there is no product before a layer's first


@pytest.mark.parametrize(
    ("name", "reduction"), [("v5e-4", "reduce-scatter"), ("v5e-16", "all-reduce"), ("v5p-8", "reduce-scatter")]
)
def test_gradients_are_reduced_beside_products(name, reduction, tpu_compiler):
    mesh = mesh_of(name)
    before, now = (
        collectives_of_gradients(mesh, options, width=1024, products=1)[reduction]
        for options in (compiler_options(mesh), compiler_options(mesh, whole_gradients=True))
    )
    assert before.exposed == before.bytes == now.bytes > 0
    assert now.exposed == 0


@pytest.mark.parametrize(("width", "joined"), [(1024, True), (2048, False)])
def test_only_small_reductions_are_joined_to_one(width, joined, tpu_compiler):
    mesh = mesh_of("v5e-16")
    options = compiler_options(mesh, whole_gradients=True)
    found = collectives_of_gradients(mesh, options, width, products=2)["all-reduce"]
    assert (found.count, found.exposed) == ((1, found.bytes) if joined else (2, 0))
