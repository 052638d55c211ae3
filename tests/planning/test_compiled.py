"""What the compiler is asked, and what is read from its answer; programs themselves are compiled in `test_plan.py`."""

import math

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import SingleDeviceSharding

from derta_jax.config import MeshShape
from derta_jax.errors import UserError
from derta_jax.planning.compiled import GIB, compile_for, compile_lowered, full_batch, needed_bytes
from derta_jax.planning.slices import find_slice
from derta_jax.training.mesh import make_mesh
from derta_jax.training.program import BatchShape
from tests.planning.conftest import plan_config, small_model


@pytest.mark.parametrize(
    ("message", "gib"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (64.44G) "
            "exceeds available HBM (15.75G).",
            64.44,
        ),
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 22.19G of 15.75G hbm.", 22.19),
        ("RESOURCE_EXHAUSTED: … HLO temporaries (1.5T) exceeds available HBM (95.74G).", 1536),
        ("RESOURCE_EXHAUSTED: … Used 512.00M of 256M hbm.", 0.5),
    ],
)
def test_what_a_program_needs_is_in_the_compilers_message(message, gib):
    assert needed_bytes(message) == pytest.approx(gib * GIB)


def test_the_compilers_message_counts_arguments_and_results(libtpu):
    # three times 6 GiB: what goes in, what of it is moved along, and what comes out
    device = find_slice("v5e-1").devices()[0]
    x = jax.ShapeDtypeStruct((3 * 2**17, 4, 1024), jnp.float32, sharding=SingleDeviceSharding(device))
    memory, cost = compile_lowered(jax.jit(lambda x: jnp.roll(x, 1, 0) * 2 + x.sum(0)).lower(x))
    assert memory.peak == pytest.approx(18 * GIB, rel=0.01)
    assert cost is None


def test_other_errors_of_the_compiler_say_nothing_of_memory():
    assert needed_bytes("INTERNAL: Mosaic failed to compile TPU kernel: 64.44G exceeds nothing") is None


def test_an_operation_that_vmem_does_not_hold_is_told_apart():
    message = "RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem. Used 16.31M of 16.00M vmem.\n\nProgram vmem"
    with pytest.raises(UserError, match=r"Used 16\.31M of 16\.00M vmem\.\nwhat matters are the shapes"):
        needed_bytes(message)


def test_rows_fill_their_sequences_with_labels():
    config = plan_config(train={"batch_size": 32, "sequence_length": 128, "accumulation": 2})
    assert full_batch(config, make_mesh(config.mesh)) == BatchShape(32, 128, 2, label_capacity=2 * 128)
    with_tensor = plan_config(train={"batch_size": 32, "accumulation": 2}, mesh={"tensor": 4})
    # two groups of four chips share a row's tokens
    assert full_batch(with_tensor, make_mesh(with_tensor.mesh)).label_capacity == 8 * 128


@pytest.mark.parametrize(
    "train", [{"batch_size": 4}, {"batch_size": 8, "accumulation": 2}, {"batch_size": 12}], ids=str
)
def test_rows_that_do_not_split_over_devices_are_a_users_mistake(train):
    with pytest.raises(UserError, match=r"train\.batch_size = .*8 devices.*mesh\.tensor, or less accumulation"):
        full_batch(plan_config(train=train), make_mesh(MeshShape()))


def test_a_mesh_that_the_slice_does_not_have_is_a_users_mistake(libtpu):
    with pytest.raises(UserError, match="there are 4 devices"):
        compile_for(plan_config(mesh={"fsdp": 8}), small_model(), find_slice("v5e-4"))
    with pytest.raises(UserError, match=r"set mesh\.data = 2"):
        compile_for(plan_config(train={"batch_size": 8}), small_model(), find_slice("2xv5e-4"))


def test_a_model_that_the_mesh_does_not_split_is_a_users_mistake(libtpu):
    with pytest.raises(UserError, match=r"does not split over mesh\.tensor"):
        compile_for(plan_config(mesh={"tensor": 2}), small_model(), find_slice("v5e-4"))


@pytest.mark.parametrize("memory_only", [False, True])
def test_jaxs_settings_are_afterwards_what_they_were(memory_only, libtpu):
    names = ("jax_enable_compilation_cache", "jax_exec_time_optimization_effort")
    before = [getattr(jax.config, name) for name in names]
    compiled = compile_for(plan_config(train={"batch_size": 1}), small_model(), find_slice("v5e-1"), memory_only)
    assert [getattr(jax.config, name) for name in names] == before
    assert compiled.fits
    assert compiled.cost is not None
    assert math.isnan(compiled.cost.estimated_cycles) == memory_only
    assert 0 < compiled.peak_bytes < compiled.limit_bytes == 15.75 * GIB


@pytest.fixture
def jax_cache(tmp_path):
    """JAX's cache of compiled programs in a directory of the test's own, and in use."""
    before = jax.config.values["jax_compilation_cache_dir"]
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    compilation_cache.reset_cache()
    jax.jit(lambda x: x * 3 + 1)(jnp.arange(3.0)).block_until_ready()
    assert list(tmp_path.iterdir())
    yield tmp_path
    jax.config.update("jax_compilation_cache_dir", before)
    compilation_cache.reset_cache()


def test_programs_for_chips_that_are_not_there_stay_out_of_jaxs_cache(jax_cache, libtpu):
    kept = {file.name for file in jax_cache.iterdir()}
    for _ in range(2):  # one that is read back is an error
        compile_for(plan_config(train={"batch_size": 1}), small_model(), find_slice("v5e-1"), memory_only=True)
    assert not [name for name in {file.name for file in jax_cache.iterdir()} - kept if name.startswith("jit_step")]
    jax.jit(lambda x: x * 5 + 1)(jnp.arange(3.0)).block_until_ready()
    assert {file.name for file in jax_cache.iterdir()} - kept
