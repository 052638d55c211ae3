"""The objective over a mixture of experts: its load-balancing loss, logged and weighed, on every mesh."""

import numpy as np
import pytest
import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from derta_jax.models.decoder import Decoder
from derta_jax.objectives.derta import Derta
from derta_jax.objectives.objective import objective_loss
from derta_jax.training.mesh import make_mesh
from tests.models.test_moe import MESHES, as_on_disk
from tests.objectives import referee
from tests.objectives.test_derta import Case, assert_grads_equal, assert_grads_equal_torch, torch_loss_and_grads

AUX_WEIGHT = 0.05


@pytest.fixture(scope="module")
def case(tiny_mixtral) -> Case:
    return Case(tiny_mixtral, "derta", Derta(router_aux_weight=AUX_WEIGHT))


@pytest.fixture(scope="module")
def reference(case):
    """One row a sequence, one device, no accumulation, no remat."""
    return case.ours(case.batch(packed=False))


def aux_loss(model, rows) -> torch.Tensor:
    """transformers' loss over all tokens of rows that are run one by one."""
    by_row = [model(torch.tensor([tokens]), output_router_logits=True).router_logits for tokens, _ in rows]
    by_layer = tuple(torch.cat(logits) for logits in zip(*by_row, strict=True))
    return load_balancing_loss_func(by_layer, model.config.num_local_experts, model.config.num_experts_per_tok)


def test_loss_and_every_gradient_agree_with_pytorch(case, reference):
    rows = case.referee_rows()
    expected, grads = torch_loss_and_grads(
        case,
        lambda model: referee.weighted_mean_loss(model, rows, [1.0] * len(rows)) + AUX_WEIGHT * aux_loss(model, rows),
    )
    loss, ours = reference
    assert loss == pytest.approx(expected, rel=1e-5)
    assert_grads_equal_torch(case.config, ours, dict(as_on_disk(grads.items(), case.config.ffn_dim)))


def test_the_load_balancing_loss_is_off_unless_asked_for(tiny_mixtral, case, reference):
    without, _ = Case(tiny_mixtral, "derta", Derta()).ours(case.batch())
    rows = case.referee_rows()
    expected, _ = torch_loss_and_grads(case, lambda model: referee.weighted_mean_loss(model, rows, [1.0] * len(rows)))
    assert without == pytest.approx(expected, rel=1e-5)
    assert without < reference[0]


def test_packing_does_not_change_loss_or_gradients(case, reference):
    packed = case.batch()
    assert packed.sequences < len(case.rows)
    loss, grads = case.ours(packed, remat="full")
    assert loss == pytest.approx(reference[0], rel=1e-5)
    assert_grads_equal(grads, reference[1])


@pytest.mark.parametrize("shape", MESHES.values(), ids=list(MESHES))
def test_eight_devices_give_the_loss_and_gradients_of_one(case, reference, shape):
    mesh = make_mesh(shape)
    shards = mesh.size // mesh.shape["tensor"]
    loss, grads = case.ours(case.batch(shards=shards), mesh=mesh)
    assert loss == pytest.approx(reference[0], rel=1e-5)
    assert_grads_equal(grads, reference[1])


def test_metrics_hold_the_load_balancing_loss_before_its_weight(case):
    import jax

    batches = case.batch()
    micro = {name: array[0] for name, array in batches[0].items()}
    loss = objective_loss(case.objective, Decoder(case.config), case.refusal)
    loss_sum, weight_sum, sums = jax.device_get(loss({"params": case.params}, micro, jax.random.key(0)))
    aux = sums["loss_aux"]
    balance = aux.total / aux.count
    assert aux.count == (batches[0]["segment_ids"] > 0).sum()
    assert balance > case.config.experts_per_token
    assert loss_sum / weight_sum == pytest.approx(
        (sums["loss_mle"].total + sums["loss_rto"].total) / weight_sum + AUX_WEIGHT * balance, rel=1e-5
    )
    assert np.isfinite(loss_sum)
