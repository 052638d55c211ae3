"""What XLA is told for a kind of device, and that it makes a difference there."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from derta_jax.planning.hlo_cost import program_cost
from derta_jax.planning.slices import GENERATIONS, SLICES, find_slice
from derta_jax.training.compiler import BY_DEVICE_KIND, BY_PLATFORM, compiler_options


def smallest(family):
    return next(place for place in SLICES.values() if place.family == family).devices()[0]


def cycles_of_a_product(device, options):
    """Out of the feed-forward layers of LLaMA 3 70B, for 4,096 tokens."""
    place = SingleDeviceSharding(device)
    x, weight = (jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=place) for shape in ((4096, 28672), (28672, 8192)))
    compiled = jax.jit(jnp.matmul, compiler_options=options).lower(x, weight).compile()
    return program_cost(compiled.as_text() or "").estimated_cycles


def test_every_generation_is_known_by_the_name_of_its_devices(tpu_compiler):
    assert {smallest(family).device_kind for family in GENERATIONS} == set(BY_DEVICE_KIND)


def test_a_device_has_the_options_of_its_platform_and_of_its_kind(tpu_compiler):
    device = find_slice("v5p-8").devices()[0]
    assert compiler_options(device) == BY_PLATFORM["tpu"] | BY_DEVICE_KIND["TPU v5"]
    assert compiler_options(jax.devices("cpu")[0]) == BY_PLATFORM["cpu"]


@pytest.mark.parametrize("family", ["v5e", "v5p"])
def test_with_larger_tiles_a_product_takes_fewer_cycles(family, tpu_compiler):
    device = smallest(family)
    assert cycles_of_a_product(device, compiler_options(device)) < cycles_of_a_product(device, BY_PLATFORM["tpu"])
