"""A base in 4 bits: small, near the original, the same on every mesh, and frozen."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from derta_jax.config import MeshShape
from derta_jax.errors import UserError
from derta_jax.interop.hf_load import load_pretrained
from derta_jax.models.lora import adapter_variables, target_rows
from derta_jax.models.params import row
from derta_jax.models.quantise import COLLECTION, quantise, unpack
from derta_jax.training.mesh import make_mesh, single_device_mesh
from tests.conftest import write_tiny_model
from tests.models.test_lora import random_adapter

TOKENS = np.random.default_rng(0).integers(3, 64, (8, 12))


@pytest.fixture(scope="module", params=["llama", "mixtral"])
def directory(request, tmp_path_factory):
    sizes = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 128, "vocab_size": 64}
    return write_tiny_model(tmp_path_factory.mktemp("quantise") / request.param, request.param, **sizes)


def variables_on(directory, mesh):
    model, params = load_pretrained(directory, mesh=mesh)
    return model, quantise(model.config, params, mesh)


def loss_and_grads(directory, mesh):
    """Of an adapter on a base in 4 bits."""
    model, base = variables_on(directory, mesh)
    adapter = adapter_variables({"default": random_adapter(model.config, mesh=mesh)})

    def loss(lora):
        variables = {**base, "lora": lora, "lora_scale": adapter["lora_scale"]}
        log_p = jax.nn.log_softmax(model.apply(variables, TOKENS)[:, :-1], -1)
        return -jnp.take_along_axis(log_p, TOKENS[:, 1:, None], -1).mean()

    with jax.set_mesh(mesh):
        return jax.device_get(jax.jit(jax.value_and_grad(loss))(adapter["lora"]))


def test_linear_layers_take_four_bits_and_the_others_stay_as_they_were(directory):
    model, params = load_pretrained(directory)
    kept = jax.device_get(params)
    variables = quantise(model.config, params, single_device_mesh())
    for target in target_rows(model.config):
        codes = variables[COLLECTION]["layers"][target.name]
        analysis: Any = jax.jit(lambda codes: codes).lower(codes).compile().memory_analysis()
        assert 8 * analysis.argument_size_in_bytes / kept["layers"][target.name].size == pytest.approx(4.25), (
            target.name
        )
    for name in ("embed", "norm", "head"):
        np.testing.assert_array_equal(variables["params"][name], kept[name])


def test_weights_come_back_within_a_tenth_and_their_largest_exactly(directory):
    model, params = load_pretrained(directory, "bfloat16")
    original = np.asarray(params["layers"]["gate"]).astype(np.float32)
    packed = quantise(model.config, params, single_device_mesh())[COLLECTION]["layers"]["gate"]
    weight = np.asarray(unpack(packed)).astype(np.float32)
    assert np.abs(weight - original).mean() < 0.1 * np.abs(original).mean()
    assert np.abs(weight).max() == np.abs(original).max()


def test_logits_are_those_of_the_unpacked_weights(directory):
    model, variables = variables_on(directory, single_device_mesh())
    layers = variables["params"]["layers"] | {
        name: jax.jit(lambda codes: unpack(codes).astype(jnp.float32))(codes)
        for name, codes in variables[COLLECTION]["layers"].items()
    }
    apply = jax.jit(lambda variables: model.apply(variables, TOKENS))
    unpacked = apply({"params": variables["params"] | {"layers": layers}})
    np.testing.assert_allclose(apply(variables), unpacked, rtol=0, atol=2e-5)


@pytest.mark.parametrize("shape", [MeshShape(fsdp=8), MeshShape(fsdp=4, tensor=2)], ids=["fsdp 8", "fsdp 4 × tensor 2"])
def test_eight_devices_give_the_loss_and_gradients_of_one(directory, shape):
    expected, actual = (loss_and_grads(directory, mesh) for mesh in (single_device_mesh(), make_mesh(shape)))
    assert actual[0] == pytest.approx(expected[0], rel=1e-5)
    for path, grad in jax.tree.leaves_with_path(actual[1]):
        wanted = expected[1]
        for key in path:
            wanted = wanted[key.key]
        np.testing.assert_allclose(grad, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max(), err_msg=str(path))


def test_a_side_that_does_not_divide_into_blocks_is_named(tiny_llama):
    model, params = load_pretrained(tiny_llama)
    assert row(model.config, "layers/query").shape(model.config)[-2] == 32
    with pytest.raises(UserError, match="q_proj has 32 inputs, not a multiple of a block's 64"):
        quantise(model.config, params, single_device_mesh())
