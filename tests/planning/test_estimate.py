"""Seconds and dollars, by hand: a model of a few numbers, and a program that nobody compiled."""

import pytest

from derta_jax.models.config import ModelConfig
from derta_jax.planning.estimate import Estimate, dollars, estimate
from derta_jax.planning.hlo_cost import Collective, ProgramCost
from derta_jax.planning.slices import find_slice
from tests.planning.conftest import plan_config, small_model

TINY = {
    "hidden_size": 4,
    "intermediate_size": 8,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_hidden_layers": 2,
    "vocab_size": 16,
}
# q and o 4·4, k and v 4·2, gate, up and down 4·8 each: 144 a layer
PER_TOKEN = 6 * 2 * 144
HEAD = 6 * 4 * 16
PER_PAIR = 12 * 2 * 2 * 2
ATTENDED = (1 + 2 + 3 + 4) / 4
TOKENS = 8 * 4
STEP_FLOPS = TOKENS * (PER_TOKEN + HEAD + PER_PAIR * ATTENDED)

PEAK = 197e12
LINKS = 2 * 45e9
"""Of a chip of v5e-4, which is 2x2."""


@pytest.fixture
def dense() -> ModelConfig:
    return small_model(**TINY)


@pytest.fixture
def mixture() -> ModelConfig:
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.0}
    return small_model(**TINY, model_type="mixtral", architectures=["MixtralForCausalLM"], **experts)


def estimated(
    model, cycles=3e9, kernels=(), name="v5e-4", gradient_bytes=0.0, train=None, exposed=0.0, host_bytes=0.0, **moved
) -> Estimate:
    """Of 8 rows of 4 tokens; collectives as keywords, all_reduce=bytes, of which the share `exposed` is waited for."""
    config = plan_config(train={"batch_size": 8, "sequence_length": 4, "remat": "none"} | (train or {}))
    collectives = {kind.replace("_", "-"): Collective(1, 1, size, exposed * size) for kind, size in moved.items()}
    cost = ProgramCost(cycles, collectives, host_bytes, dict.fromkeys(kernels, 1))
    return estimate(config, model, find_slice(name), cost, gradient_bytes)


def test_compute_is_the_compilers_cycles_at_the_chips_clock(dense):
    found = estimated(dense, cycles=3e9)
    assert found.seconds == found.compute_seconds == found.upper == 3e9 / 1.5e9
    assert found.kernel_seconds == found.collective_seconds == 0


def test_flops_are_the_models_and_mfu_is_their_share_of_all_chips_peak(dense):
    found = estimated(dense)
    assert found.step_flops == STEP_FLOPS == 75_264
    assert found.model_flops_per_token == 75_264 / 32
    assert found.mfu == pytest.approx(75_264 / 4 / PEAK / 2.0)
    assert found.tokens_per_second_per_chip == 32 / 4 / 2.0


def test_rematerialisation_counts_in_time_and_not_in_mfus_flops(dense):
    assert estimated(dense, train={"remat": "full"}).step_flops == STEP_FLOPS


def test_splash_kernels_take_attentions_flops_at_half_of_peak(dense):
    found = estimated(dense, kernels=["tpu_custom_call/splash_mha_fwd", "tpu_custom_call/splash_mha_dkv"])
    assert found.kernel_seconds == pytest.approx(PER_PAIR * ATTENDED * TOKENS / 4 / (PEAK / 2))
    assert found.seconds == pytest.approx(2.0 + found.kernel_seconds)


def test_grouped_products_take_the_active_experts_flops_at_half_of_peak(mixture):
    # attention 48 and router 4·4, two experts of 96 each: three quarters of a layer are experts
    found = estimated(mixture, kernels=["tpu_custom_call/gmm", "tpu_custom_call/tgmm"])
    assert found.kernel_seconds == pytest.approx(6 * 2 * (2 * 96) * TOKENS / 4 / (PEAK / 2))


def test_both_kinds_of_kernels_add_up(mixture):
    splash, gmm = "tpu_custom_call/splash_mha_fwd", "tpu_custom_call/gmm"
    apart = [estimated(mixture, kernels=[name]).kernel_seconds for name in (splash, gmm)]
    assert estimated(mixture, kernels=[splash, gmm]).kernel_seconds == pytest.approx(sum(apart))


def test_kernels_of_a_rematerialised_layer_run_forward_twice(dense):
    once, twice = (
        estimated(dense, kernels=["tpu_custom_call/splash_mha_fwd"], train={"remat": remat}).kernel_seconds
        for remat in ("attention", "full")
    )
    assert twice == pytest.approx(4 / 3 * once)
    offloaded = estimated(dense, kernels=["tpu_custom_call/splash_mha_fwd"], train={"remat": "offload"})
    assert offloaded.kernel_seconds == twice


def test_what_else_has_no_estimate_counts_nothing(dense):
    assert estimated(dense, kernels=["AllocateBuffer", "fusion", "async-collective-start"]).kernel_seconds == 0


def test_collectives_take_their_bytes_over_the_chips_links(dense):
    assert estimated(dense, all_gather=45e9).collective_seconds == 45e9 / LINKS
    assert estimated(dense, all_gather=45e9, reduce_scatter=45e9).collective_seconds == 1.0


def test_an_all_reduce_sends_its_bytes_twice(dense):
    assert estimated(dense, all_reduce=45e9).collective_seconds == 1.0
    assert estimated(dense, all_reduce=45e9, all_to_all=90e9).collective_seconds == 2.0


def test_collectives_hide_behind_compute_until_they_take_longer(dense):
    hidden, longer = estimated(dense, all_gather=90e9), estimated(dense, all_gather=450e9)
    assert (hidden.seconds, hidden.upper) == (2.0, 3.0)
    assert (longer.seconds, longer.upper) == (5.0, 7.0)
    assert longer.tokens_per_second_per_chip == 32 / 4 / 5.0
    assert longer.mfu == pytest.approx(STEP_FLOPS / 4 / PEAK / 5.0)


def test_what_is_waited_for_adds_to_compute(dense):
    found = estimated(dense, all_gather=90e9, exposed=0.25)
    assert (found.collective_seconds, found.exposed_seconds) == (1.0, 0.25)
    assert (found.seconds, found.upper) == (2.25, 3.0)
    assert estimated(dense, all_reduce=45e9, exposed=1.0).seconds == estimated(dense, all_reduce=45e9).upper == 3.0
    assert estimated(dense, all_gather=450e9, exposed=0.25).seconds == 5.0


def test_what_the_host_keeps_hides_behind_compute_until_it_takes_longer(dense):
    hidden, longer = estimated(dense, host_bytes=16e9), estimated(dense, host_bytes=48e9, all_gather=90e9)
    assert (hidden.host_seconds, hidden.seconds, hidden.upper) == (1.0, 2.0, 3.0)
    assert (longer.host_seconds, longer.seconds, longer.upper) == (3.0, 3.0, 6.0)


def test_one_chip_moves_nothing(dense):
    found = estimated(dense, name="v5e-1", all_reduce=45e9)
    assert found.collective_seconds == 0
    assert found.tokens_per_second_per_chip == 32 / 2.0


def test_gradients_cross_the_network_between_slices_once_a_micro_batch(dense):
    # an all-reduce: twice the bytes, at 6.25 GB/s
    assert estimated(dense, name="2xv5e-4", gradient_bytes=6.25e9).collective_seconds == 2.0
    found = estimated(dense, name="2xv5e-4", gradient_bytes=6.25e9, train={"accumulation": 2}, all_gather=90e9)
    assert found.collective_seconds == 1.0 + 4.0
    assert found.tokens_per_second_per_chip == 32 / 8 / 5.0
    assert estimated(dense, gradient_bytes=6.25e9).collective_seconds == 0


def test_a_window_leaves_fewer_pairs(dense):
    windowed = small_model(**TINY, model_type="mistral", architectures=["MistralForCausalLM"], sliding_window=2)
    assert estimated(windowed).step_flops == TOKENS * (PER_TOKEN + HEAD + PER_PAIR * (1 + 2 + 2 + 2) / 4)


def test_dollars_are_all_chips_hours_at_the_list_price_or_a_given_one():
    assert dollars(find_slice("v5e-16"), 2.0, None) == pytest.approx(2 * 16 * 1.20)
    assert dollars(find_slice("v5p-128"), 1.0, None) == pytest.approx(64 * 4.20)
    assert dollars(find_slice("2xv5e-16"), 2.0, 0.5) == 2 * 32 * 0.5
    assert dollars(find_slice("v5e-16"), 2.0, 0.0) == 0
