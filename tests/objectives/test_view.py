"""The model as an objective sees it: losses of each token's likelihood, layers, adapters on and off."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from derta_jax.interop.hf_load import load_params
from derta_jax.models.decoder import Decoder
from derta_jax.models.lora import Adapter, adapter_variables, factor_shapes, target_rows
from derta_jax.objectives.view import View
from derta_jax.training.mesh import make_mesh
from derta_jax.training.step import batch_sharding
from tests.objectives.test_derta import MESHES, Case


@pytest.fixture(scope="module")
def case(tiny_llama) -> Case:
    return Case(tiny_llama, "derta")


def micro_of(batches):
    return {name: array[0] for name, array in batches[0].items()}


def adapted(case: Case):
    """The case's variables with an adapter that changes what the model says."""
    draw = np.random.default_rng(0)
    factors = {
        row.name: {
            name: jnp.float32(draw.normal(size=shape, scale=0.1))
            for name, shape in factor_shapes(case.config, row, 4).items()
        }
        for row in target_rows(case.config)
    }
    adapter = Adapter(factors, dict.fromkeys(factors, 1.0))
    return {"params": case.params, **adapter_variables({"default": adapter})}


def plain_nll(model, variables, micro):
    """-log P of each labelled token by the whole softmax."""
    logits = model.apply(variables, micro["token_ids"], micro["segment_ids"], micro["positions"])
    logs = jax.nn.log_softmax(logits[:, :-1])
    found = -jnp.take_along_axis(logs, micro["token_ids"][:, 1:, None], -1)[..., 0]
    return jnp.pad(found, ((0, 0), (1, 0))) * micro["keep"]


def squares(nll):
    """A loss of each sequence's sum: not one of sums over tokens."""
    by_sequence = nll.sum(-1)
    return (by_sequence**2).sum() / 100, by_sequence


@pytest.mark.parametrize("shape", [None, *MESHES.values()], ids=["one device", *MESHES])
def test_a_loss_of_sums_over_tokens_has_the_gradients_of_autodiff(case, shape):
    mesh = shape and make_mesh(shape)
    batches = case.batch(shards=mesh.shape["data"] * mesh.shape["fsdp"] if mesh else 1)
    micro, model = micro_of(batches), Decoder(case.config)

    def ours(params, micro):
        view = View(model, {"params": params}, case.refusal, batches.label_capacity, loss_chunk=16)
        return view.loss_of_nll(squares, view.forward(micro), micro["token_ids"], micro["keep"])

    def plain(params):
        return squares(plain_nll(model, {"params": params}, micro))

    (expected, sums), gradients = jax.value_and_grad(plain, has_aux=True)(case.params)
    run = jax.jit(jax.value_and_grad(ours, has_aux=True))
    if mesh is None:
        (loss, found), grads = run(case.params, micro)
    else:
        with jax.set_mesh(mesh):
            params = load_params(case.directory, case.config, mesh=mesh)
            placed = jax.device_put(batches[0], batch_sharding(mesh))
            (loss, found), grads = run(params, {name: array[0] for name, array in placed.items()})
    assert loss == pytest.approx(float(expected), rel=1e-5)
    np.testing.assert_allclose(found, sums, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max()), grads, gradients)


def test_an_adapter_switched_off_leaves_the_model_beneath_it(case):
    micro, model = micro_of(case.batch()), Decoder(case.config)
    view = View(model, adapted(case), case.refusal)
    beneath = View(model, {"params": case.params}, case.refusal).forward(micro).hidden
    np.testing.assert_array_equal(view.without("default").forward(micro).hidden, beneath)
    assert np.abs(view.forward(micro).hidden - beneath).max() > 0.01


def test_what_is_frozen_has_no_gradient(case):
    micro, model = micro_of(case.batch()), Decoder(case.config)

    def total(params):
        return View(model, {"params": params}, case.refusal).frozen().forward(micro).hidden.sum()

    assert all(not leaf.any() for leaf in jax.tree.leaves(jax.grad(total)(case.params)))


def test_layers_are_those_of_transformers(case, tiny_llama):
    import torch
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    row = case.rows[0]
    with torch.no_grad():
        found = theirs(torch.tensor(row.token_ids)[None].long(), output_hidden_states=True).hidden_states
    ids = jnp.array(row.token_ids)[None]
    micro = {"token_ids": ids, "segment_ids": jnp.ones_like(ids), "positions": jnp.arange(len(row))[None]}
    forward = View(Decoder(case.config), {"params": case.params}, case.refusal).forward(micro, layers=True)
    assert forward.layers is not None
    assert len(forward.layers) == case.config.layers
    # transformers norms the last one
    for mine, reference in zip(forward.layers[:-1], found[1:-1], strict=True):
        np.testing.assert_allclose(mine, reference, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(forward.hidden, found[-1], rtol=1e-4, atol=1e-5)
