import jax
import jax.numpy as jnp
import pytest

from derta_jax.config import Lora
from derta_jax.models.config import ModelConfig
from derta_jax.models.decoder import Decoder
from derta_jax.models.lora import DEFAULT, Adapter, adapter_variables, factor_shapes, target_rows
from derta_jax.objectives.derta import Derta
from derta_jax.objectives.objective import objective_loss
from derta_jax.training.watching.flops import (
    adapter_parameters,
    flops_per_token,
    layer_parameters,
    mean_attended,
    peak_flops,
    train_flops,
)

BILLION = 10**9

LLAMA_3_8B = ModelConfig("llama", 128_256, 4096, 14_336, layers=32, heads=32, kv_heads=8, head_dim=128)
LLAMA_2_7B = ModelConfig("llama", 32_000, 4096, 11_008, layers=32, heads=32, kv_heads=32, head_dim=128)
MISTRAL_7B = ModelConfig("mistral", 32_000, 4096, 14_336, 32, 32, 8, 128, sliding_window=4096)
MIXTRAL_8X7B = ModelConfig("mixtral", 32_000, 4096, 14_336, 32, 32, 8, 128, experts=8, experts_per_token=2)
LLAMA_32_1B = ModelConfig("llama", 128_256, 2048, 8192, layers=16, heads=32, kv_heads=8, head_dim=64, tied_head=True)


@pytest.mark.parametrize(
    ("model", "published", "embeddings"),
    [
        # the parameters that each model's card or paper gives, and how many of them are looked up, not multiplied
        (LLAMA_3_8B, 8.03, 128_256 * 4096),
        (LLAMA_2_7B, 6.74, 32_000 * 4096),
        (MISTRAL_7B, 7.24, 32_000 * 4096),
        (MIXTRAL_8X7B, 12.9, 32_000 * 4096),  # active ones
        (LLAMA_32_1B, 1.236, 0),  # the embedding is the head
    ],
)
def test_parameters_are_those_published_but_the_embedding(model, published, embeddings):
    multiplied = layer_parameters(model) + model.embed_dim * model.vocab_size
    assert multiplied == pytest.approx(published * BILLION - embeddings, rel=2e-3)


def test_a_token_of_llama_3_8b_takes_six_flops_a_parameter_and_those_of_attention():
    attention = 12 * 32 * 4096 * 512
    assert flops_per_token(LLAMA_3_8B, None, attended=512) == pytest.approx(6 * 7.505 * BILLION + attention, rel=1e-3)


def test_the_head_counts_where_there_is_a_label():
    head = 6 * 4096 * 128_256
    all_labelled, none = (flops_per_token(LLAMA_3_8B, None, 512, labelled=share) for share in (1.0, 0.0))
    assert all_labelled - none == head
    assert train_flops(LLAMA_3_8B).of(tokens=1000, labelled=250, attended=512) == pytest.approx(
        1000 * none + 250 * head
    )


def test_adapters_spare_the_gradients_of_frozen_weights():
    lora = Lora(rank=16, targets=("q_proj", "v_proj"))
    adapters = 32 * 16 * (4096 + 4096 + 4096 + 1024)
    assert adapter_parameters(LLAMA_3_8B, lora) == adapters
    frozen = train_flops(LLAMA_3_8B)
    assert train_flops(LLAMA_3_8B, lora).per_token == frozen.per_token * 4 // 6 + 6 * adapters
    assert train_flops(LLAMA_3_8B, lora).per_labelled_token == frozen.per_labelled_token * 4 // 6
    assert train_flops(LLAMA_3_8B, lora).per_attended_pair == frozen.per_attended_pair


def test_of_adapters_on_experts_the_active_ones_count():
    lora = Lora(rank=4, targets=("w1",))
    assert adapter_parameters(MIXTRAL_8X7B, lora) == 32 * 2 * 4 * (4096 + 14_336)


@pytest.mark.parametrize(
    ("length", "window", "expected"), [(1, None, 1), (4, None, 2.5), (4, 2, (1 + 2 + 2 + 2) / 4), (4, 9, 2.5)]
)
def test_the_mean_attended_length_counts_the_causal_half_and_the_window(length, window, expected):
    assert mean_attended(length, window) == expected


@pytest.mark.parametrize(
    ("kind", "dtype", "expected"),
    [
        ("TPU v5 lite", "bfloat16", 197e12),
        ("TPU v5", "bfloat16", 459e12),
        ("TPU v6 lite", "bfloat16", 918e12),
        ("NVIDIA H200", "bfloat16", 989.4e12),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bfloat16", None),
        ("TPU v5 lite", "float32", None),
        ("cpu", "bfloat16", None),
    ],
)
def test_a_device_or_dtype_that_is_not_known_has_no_peak(kind, dtype, expected):
    assert peak_flops(kind, dtype) == expected


ONE_LAYER = ModelConfig("llama", 1024, 256, 768, layers=1, heads=8, kv_heads=4, head_dim=32)
S, T = 2, 256


@pytest.mark.parametrize("lora", [None, Lora(rank=8, dropout=0.0)], ids=["full", "adapters"])
def test_the_compiler_counts_the_same_products(lora):
    """XLA's own count of a one-layer model's gradients (it counts the body of a scan once); every position has a label,
    and attention computes the masked half as well.
    """
    model = Decoder(ONE_LAYER, dtype=jnp.float32, remat="none")
    loss = objective_loss(Derta(loss_chunk=S * T), model, refusal_id=3)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8), jnp.int32))
    trained, frozen = {"params": shapes["params"]}, {}
    if lora:
        rows = target_rows(ONE_LAYER)
        factors = {
            row.name: {
                name: jax.ShapeDtypeStruct(shape, jnp.float32)
                for name, shape in factor_shapes(ONE_LAYER, row, lora.rank).items()
            }
            for row in rows
        }
        frozen = trained | {
            "lora_scale": adapter_variables({DEFAULT: Adapter(factors, dict.fromkeys(factors, 1.0))})["lora_scale"]
        }
        trained = {"lora": {"layers": {DEFAULT: factors}}}
    whole = {name: jax.ShapeDtypeStruct((S, T), jnp.int32) for name in ("token_ids", "segment_ids", "positions")}
    whole |= {"stream": jax.ShapeDtypeStruct((S, T), jnp.uint8), "keep": jax.ShapeDtypeStruct((S, T), jnp.bool)}

    def gradient(trained, frozen, batch):
        return jax.grad(lambda trained: loss({**frozen, **trained}, batch, jax.random.key(0))[0])(trained)

    counted = jax.jit(gradient).lower(trained, frozen, whole).compile().cost_analysis() or {}
    c = ONE_LAYER
    expected = S * T * flops_per_token(c, lora, attended=T)
    if lora:
        # nothing below the first layer is trained: its inputs get no gradient
        inputs = c.embed_dim * (c.heads + 2 * c.kv_heads) * c.head_dim + 3 * c.embed_dim * lora.rank
        expected -= S * T * 2 * inputs
    # rope swaps halves of heads by a product, forward and backward, which is no FLOP of the model
    expected += 2 * S * T * 2 * (c.heads + c.kv_heads) * c.head_dim**2
    assert counted["flops"] == pytest.approx(expected, rel=0.02)
