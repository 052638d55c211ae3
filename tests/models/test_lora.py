"""Low-rank adapters: against peft, against merged weights, switched, dropped and sharded."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from derta_jax.config import MeshShape
from derta_jax.errors import UserError
from derta_jax.interop.hf_load import load_pretrained, read_model_config
from derta_jax.models.lora import (
    Adapter,
    abstract_adapter,
    adapter_variables,
    init_adapter,
    merge,
    switched,
    target_rows,
)
from derta_jax.models.params import parameter_table
from derta_jax.training.mesh import make_mesh, single_device_mesh

TOKENS = np.random.default_rng(0).integers(3, 300, (8, 12))
MESHES = {
    "fsdp 8": MeshShape(fsdp=8),
    "fsdp 4 × tensor 2": MeshShape(fsdp=4, tensor=2),
    "data 2 × fsdp 2 × tensor 2": MeshShape(data=2, fsdp=2, tensor=2),
}


@pytest.fixture(params=["tiny_llama", "tiny_mixtral"])
def directory(request):
    return request.getfixturevalue(request.param)


def random_adapter(config, seed=0, rank=4, mesh=None, targets=None) -> Adapter:
    """An adapter that has learned something: both factors are random."""
    abstract = abstract_adapter(config, target_rows(config, targets), rank, mesh or single_device_mesh())
    leaves, tree = jax.tree.flatten(abstract)
    rng = np.random.default_rng(seed)
    values = [jax.device_put(rng.normal(0, 0.1, leaf.shape).astype(np.float32), leaf.sharding) for leaf in leaves]
    return Adapter(jax.tree.unflatten(tree, values), dict.fromkeys(abstract, 2.0))


@pytest.fixture
def loaded(directory):
    model, params = load_pretrained(directory)
    return model, params, random_adapter(model.config)


def logits_of(model, variables, **options):
    return np.asarray(jax.jit(lambda variables: model.apply(variables, TOKENS, **options))(variables))


def test_an_adapter_changes_what_the_merged_weights_change(loaded):
    model, params, adapter = loaded
    base = logits_of(model, {"params": params})
    adapted = logits_of(model, {"params": params} | adapter_variables({"default": adapter}))
    merged = logits_of(model, {"params": merge(model.config, jax.tree.map(jnp.copy, params), adapter)})
    assert np.abs(adapted - base).max() > 0.1
    np.testing.assert_allclose(adapted, merged, rtol=0, atol=2e-5)


def test_a_new_adapter_changes_nothing(loaded):
    model, params, _ = loaded
    abstract = abstract_adapter(model.config, target_rows(model.config), 4, single_device_mesh())
    fresh = Adapter(init_adapter(abstract, seed=0), dict.fromkeys(abstract, 1.0))
    adapted = logits_of(model, {"params": params} | adapter_variables({"default": fresh}))
    np.testing.assert_array_equal(adapted, logits_of(model, {"params": params}))


def test_a_new_adapter_is_drawn_as_peft_draws_it(loaded):
    model, _, _ = loaded
    abstract = abstract_adapter(model.config, target_rows(model.config), 4, single_device_mesh())
    for name, factors in init_adapter(abstract, seed=0).items():
        bound = factors["a"].shape[-2] ** -0.5
        assert np.abs(factors["a"]).max() <= bound, name
        assert np.asarray(factors["a"]).std() == pytest.approx(bound / 3**0.5, rel=0.1), name
        assert not np.asarray(factors["b"]).any(), name


def test_named_adapters_are_switched_without_compiling_again(loaded):
    model, params, first = loaded
    second = random_adapter(model.config, seed=1, rank=2)
    variables = {"params": params} | adapter_variables({"first": first, "second": second})
    traces = []

    @jax.jit
    def apply(variables):
        traces.append(variables)
        return model.apply(variables, TOKENS)

    with_first = apply(switched(variables, ["first"]))
    neither = apply(switched(variables, []))
    apply(switched(variables, ["second"]))
    both = apply(variables)
    assert len(traces) == 1
    np.testing.assert_array_equal(neither, logits_of(model, {"params": params}))
    alone = logits_of(model, {"params": params} | adapter_variables({"only": first}))
    np.testing.assert_allclose(with_first, alone, rtol=0, atol=2e-5)
    assert np.abs(both - with_first).max() > 0.1


def test_gradients_reach_every_factor_and_nothing_else_is_differentiated(loaded):
    model, params, adapter = loaded
    variables = adapter_variables({"default": adapter})

    def loss(lora):
        return (
            model.apply({"params": params, "lora_scale": variables["lora_scale"], "lora": lora}, TOKENS) ** 2
        ).mean()

    grads = jax.jit(jax.grad(loss))(variables["lora"])
    jax.tree.map(lambda grad, factor: np.testing.assert_equal(grad.shape, factor.shape), grads, variables["lora"])
    assert all(np.abs(grad).max() > 0 for grad in jax.tree.leaves(grads))


def test_dropout_needs_a_random_key_and_keeps_the_mean(loaded):
    model, params, adapter = loaded
    variables = {"params": params} | adapter_variables({"default": adapter})
    dropping = model.clone(lora_dropout=0.5)
    np.testing.assert_array_equal(logits_of(dropping, variables), logits_of(model, variables))

    once, again, other = (logits_of(dropping, variables, rngs={"dropout": jax.random.key(seed)}) for seed in (0, 0, 1))
    np.testing.assert_array_equal(once, again)
    assert np.abs(once - other).max() > 0.01


def test_dropout_is_that_of_an_adapters_input(tiny_llama):
    """The mean over many draws comes near what is computed without dropout."""
    model, params = load_pretrained(tiny_llama)
    variables = {"params": params} | adapter_variables({"default": random_adapter(model.config, targets=["down_proj"])})
    dropping = model.clone(lora_dropout=0.3)
    draw = jax.jit(lambda key: dropping.apply(variables, TOKENS[:1], method="hidden_states", rngs={"dropout": key}))
    mean = jnp.stack([draw(key) for key in jax.random.split(jax.random.key(0), 300)]).mean(0)
    exact = jax.jit(lambda: model.apply(variables, TOKENS[:1], method="hidden_states"))()
    base = jax.jit(lambda: model.apply({"params": params}, TOKENS[:1], method="hidden_states"))()
    assert float(jnp.abs(mean - exact).mean()) < 0.1 * float(jnp.abs(base - exact).mean())


@pytest.mark.parametrize("shape", MESHES.values(), ids=list(MESHES))
def test_factors_lie_spread_over_the_devices_of_a_data_group(directory, shape):
    mesh = make_mesh(shape)
    adapter = random_adapter(read_model_config(directory), mesh=mesh)
    spread = mesh.size // mesh.shape["data"]
    for name, factors in adapter.factors.items():
        for factor in factors.values():
            assert factor.addressable_shards[0].data.size * spread == factor.size, name


def test_a_factor_that_does_not_split_over_the_mesh_is_refused(tmp_path):
    from tests.conftest import write_tiny_model

    directory = write_tiny_model(tmp_path / "odd", vocab_size=64, intermediate_size=36)
    config = read_model_config(directory)
    with pytest.raises(
        UserError, match="adapter of gate_proj has a side of 36, which does not split over the 8 devices"
    ):
        abstract_adapter(config, target_rows(config), 4, make_mesh(MeshShape(fsdp=8)))


def test_targets_are_the_linear_layers_but_for_embedding_head_and_router(directory):
    config = read_model_config(directory)
    left_out = {row.name for row in parameter_table(config)} - {row.name for row in target_rows(config)}
    assert left_out - {"router"} == {"embed", "attention_norm", "ffn_norm", "norm", "head"}


def test_targets_are_chosen_by_the_names_that_hugging_face_gives_them(tiny_mixtral):
    rows = target_rows(read_model_config(tiny_mixtral), ["v_proj", "w2"])
    assert [row.name for row in rows] == ["value", "down"]


def test_an_unknown_target_is_answered_with_the_nearest(tiny_llama):
    with pytest.raises(UserError) as error:
        target_rows(read_model_config(tiny_llama), ["q_porj", "v_proj"])
    assert "q_porj; did you mean 'q_proj'?" in str(error.value)


def test_the_router_is_no_target(tiny_mixtral):
    with pytest.raises(
        UserError, match=r"targets that a mixtral does not have \(it has q_proj, k_proj, v_proj, o_proj, w1"
    ):
        target_rows(read_model_config(tiny_mixtral), ["gate"])
