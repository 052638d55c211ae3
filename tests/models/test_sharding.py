"""Parameters and computation spread over the eight devices of each mesh."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from derta_jax.config import MeshShape
from derta_jax.errors import UserError
from derta_jax.interop.hf_load import load_pretrained, read_model_config
from derta_jax.models.params import leaves_with_rows
from derta_jax.models.sharding import check_mesh, gathered, param_shardings
from derta_jax.planning.slices import find_slice
from derta_jax.training.compiler import compiler_options
from derta_jax.training.mesh import make_mesh, single_device_mesh

SHAPES = {
    "fsdp 8": MeshShape(fsdp=8),
    "fsdp 4 × tensor 2": MeshShape(fsdp=4, tensor=2),
    "data 2 × fsdp 2 × tensor 2": MeshShape(data=2, fsdp=2, tensor=2),
}
TOKENS = np.random.default_rng(0).integers(3, 300, (8, 12))


@pytest.fixture(params=SHAPES.values(), ids=list(SHAPES))
def mesh(request):
    return make_mesh(request.param)


@pytest.fixture(params=["tiny_llama", "tiny_mistral", "tiny_mixtral"])
def directory(request):
    return request.getfixturevalue(request.param)


def test_the_devices_are_the_eight_simulated_ones():
    assert jax.device_count() == 8


def test_every_parameter_lands_with_the_sharding_of_its_table_row(directory, mesh):
    model, params = load_pretrained(directory, mesh=mesh)
    expected = dict(leaves_with_rows(model.config, param_shardings(model.config, mesh)))
    for row, leaf in leaves_with_rows(model.config, params):
        assert leaf.sharding == expected[row], row.path


def test_matrices_split_over_fsdp_and_tensor_and_norms_stay_whole(tiny_llama):
    mesh = make_mesh(MeshShape(fsdp=4, tensor=2))
    _, params = load_pretrained(tiny_llama, mesh=mesh)
    assert params["embed"].sharding.spec == PartitionSpec("tensor", ("fsdp", "expert"))
    assert params["layers"]["query"].sharding.spec == PartitionSpec(None, ("fsdp", "expert"), "tensor")
    assert params["layers"]["down"].sharding.spec == PartitionSpec(None, "tensor", ("fsdp", "expert"))
    assert params["layers"]["attention_norm"].sharding.is_fully_replicated
    for matrix in (params["embed"], params["head"], *(params["layers"][name] for name in ("query", "gate"))):
        assert matrix.addressable_shards[0].data.size == matrix.size // 8


def test_logits_are_those_of_a_single_device(tiny_llama, mesh):
    model, params = load_pretrained(tiny_llama)
    apply = jax.jit(lambda params: model.apply({"params": params}, TOKENS))
    expected = apply(params)
    _, sharded = load_pretrained(tiny_llama, mesh=mesh)
    with jax.set_mesh(mesh):
        logits = apply(sharded)
    assert len(logits.sharding.device_set) == 8
    np.testing.assert_allclose(logits, expected, rtol=0, atol=2e-5)


def test_a_mesh_that_fits_passes(directory, mesh):
    check_mesh(read_model_config(directory), mesh)


def test_a_mesh_that_does_not_fit_names_each_dimension_and_the_knob(tiny_llama):
    config = read_model_config(tiny_llama)
    with pytest.raises(UserError) as error:
        check_mesh(config, make_mesh(MeshShape(fsdp=1, tensor=8)))
    first, *problems = str(error.value).splitlines()
    assert first == "the mesh does not fit the model:"
    assert [problem.strip() for problem in problems] == [
        "heads = 4 does not split over mesh.tensor = 8: lower mesh.tensor",
        "kv_heads = 2 does not split over mesh.tensor = 8: lower mesh.tensor",
    ]


def test_experts_are_shared_out_and_their_matrices_split_over_the_other_axes(tiny_mixtral):
    _, params = load_pretrained(tiny_mixtral, mesh=make_mesh(MeshShape(fsdp=2, expert=2, tensor=2)))
    layers = params["layers"]
    assert layers["gate"].sharding.spec == PartitionSpec(None, "expert", "fsdp", "tensor")
    assert layers["down"].sharding.spec == PartitionSpec(None, "expert", "tensor", "fsdp")
    assert layers["query"].sharding.spec == PartitionSpec(None, ("fsdp", "expert"), "tensor")
    assert all(layers[name].addressable_shards[0].data.size == layers[name].size // 8 for name in ("gate", "query"))


@pytest.mark.parametrize(
    ("directory", "shape", "message"),
    [
        ("tiny_llama", MeshShape(expert=2), r"mesh\.expert = 2, but a llama has no experts: use mesh\.fsdp"),
        ("tiny_mixtral", MeshShape(expert=8), r"experts = 4 does not split over mesh\.expert = 8: lower mesh\.expert"),
    ],
    indirect=["directory"],
)
def test_an_expert_axis_wants_experts(directory, shape, message):
    with pytest.raises(UserError, match=message):
        check_mesh(read_model_config(directory), make_mesh(shape))


def test_loading_onto_a_mesh_that_does_not_fit_is_refused_before_reading(tiny_llama):
    with pytest.raises(UserError, match=r"kv_heads = 2 does not split over mesh\.tensor = 4"):
        load_pretrained(tiny_llama, mesh=make_mesh(MeshShape(tensor=4)))


@pytest.mark.parametrize(
    ("shape", "sizes"),
    [
        (MeshShape(), (1, 8, 1, 1)),
        (MeshShape(tensor=2), (1, 4, 1, 2)),
        (MeshShape(expert=4), (1, 2, 4, 1)),
        (MeshShape(data=4, tensor=2), (4, 1, 1, 2)),
        (MeshShape(data=8), (8, 1, 1, 1)),
    ],
)
def test_fsdp_takes_the_devices_that_the_other_axes_leave(shape, sizes):
    assert dict(make_mesh(shape).shape) == dict(zip(("data", "fsdp", "expert", "tensor"), sizes, strict=True))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (MeshShape(fsdp=4), r"mesh\.data 1 × mesh\.fsdp 4 × mesh\.expert 1 × mesh\.tensor 1 = 4, but there are 8"),
        (MeshShape(tensor=16), r"mesh\.tensor 16 = 16, but there are 8 devices"),
        (MeshShape(tensor=3), r"mesh\.fsdp 2 × mesh\.expert 1 × mesh\.tensor 3 = 6, but there are 8 devices"),
    ],
)
def test_a_mesh_of_another_number_of_devices_is_refused(shape, message):
    with pytest.raises(UserError, match=message):
        make_mesh(shape)


def test_the_evaluation_mesh_is_one_device():
    assert single_device_mesh().size == 1


def gather_in(mesh, axes=("embed", "ffn")):
    """x times a weight that lies along `fsdp`, lowered for the mesh's devices."""

    def times(weight, x):
        return x @ gathered(weight, *axes)

    weight = jax.ShapeDtypeStruct((256, 128), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("fsdp")))
    x = jax.ShapeDtypeStruct((mesh.size, 256), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("fsdp")))
    with jax.set_mesh(mesh):
        options = compiler_options(mesh)
        return jax.jit(times, compiler_options=options).lower(weight, x).compile()


def collectives(compiled) -> set[str]:
    return set(re.findall(r" (all-gather|all-reduce|reduce-scatter)(?:-start)?\(", compiled.as_text()))


def test_a_weight_is_gathered_where_its_layer_needs_it_and_the_rows_stay():
    assert collectives(gather_in(make_mesh(MeshShape()))) == {"all-gather"}


@pytest.mark.parametrize("place", ["v5p-128", "v4-128"])
def test_a_gather_over_three_rings_stays_one(place, tpu_compiler):
    mesh = make_mesh(MeshShape(), find_slice(place).devices())
    assert collectives(gather_in(mesh)) == {"all-gather"}
