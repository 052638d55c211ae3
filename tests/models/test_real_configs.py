"""The table against the published models, by names and shapes alone."""

import math

import pytest

from derta_jax.models.config import ModelConfig
from derta_jax.models.lora import factor_shapes, target_rows
from derta_jax.models.params import count_parameters, parameter_table
from derta_jax.planning.published import (
    LLAMA_3_8B,
    LLAMA_3_70B,
    MISTRAL_7B_V01,
    MISTRAL_7B_V03,
    MIXTRAL_8X7B,
    QWEN_3_8B,
)

MODELS = {
    "LLaMA 3 8B": (LLAMA_3_8B, 8_030_261_248),
    "LLaMA 3 70B": (LLAMA_3_70B, 70_553_706_496),
    "Mistral 7B v0.1": (MISTRAL_7B_V01, 7_241_732_096),
    "Mistral 7B v0.3": (MISTRAL_7B_V03, 7_248_023_552),
    "Mixtral 8x7B": (MIXTRAL_8X7B, 46_702_792_704),
    "Qwen 3 8B": (QWEN_3_8B, 8_190_735_360),
}


def tensors_of(raw: dict) -> dict[str, tuple[int, ...]]:
    """Every tensor of the published checkpoint, written down from its safetensors index."""
    width, ffn, vocabulary = raw["hidden_size"], raw["intermediate_size"], raw["vocab_size"]
    keys = width // raw["num_attention_heads"] * raw["num_key_value_heads"]
    tensors = {
        "model.embed_tokens.weight": (vocabulary, width),
        "model.norm.weight": (width,),
        "lm_head.weight": (vocabulary, width),
    }
    for layer in range(raw["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        tensors |= {
            f"{prefix}.input_layernorm.weight": (width,),
            f"{prefix}.post_attention_layernorm.weight": (width,),
            f"{prefix}.self_attn.q_proj.weight": (width, width),
            f"{prefix}.self_attn.k_proj.weight": (keys, width),
            f"{prefix}.self_attn.v_proj.weight": (keys, width),
            f"{prefix}.self_attn.o_proj.weight": (width, width),
        }
        if raw["model_type"] == "qwen3":
            tensors |= {f"{prefix}.self_attn.{name}_norm.weight": (raw["head_dim"],) for name in "qk"}
        if "num_local_experts" in raw:
            tensors[f"{prefix}.block_sparse_moe.gate.weight"] = (raw["num_local_experts"], width)
            for expert in range(raw["num_local_experts"]):
                module = f"{prefix}.block_sparse_moe.experts.{expert}"
                tensors |= {
                    f"{module}.w1.weight": (ffn, width),
                    f"{module}.w2.weight": (width, ffn),
                    f"{module}.w3.weight": (ffn, width),
                }
        else:
            tensors |= {
                f"{prefix}.mlp.gate_proj.weight": (ffn, width),
                f"{prefix}.mlp.up_proj.weight": (ffn, width),
                f"{prefix}.mlp.down_proj.weight": (width, ffn),
            }
    return tensors


@pytest.fixture(params=MODELS.values(), ids=list(MODELS))
def model(request):
    return request.param


def test_no_name_is_missing_or_extra_and_every_shape_fits(model):
    raw, _ = model
    config = ModelConfig.from_hf(raw)
    pairs = [(name, row.hf_shape(config)) for row in parameter_table(config) for name in row.hf_names(config).values()]
    assert len(dict(pairs)) == len(pairs)
    assert dict(pairs) == tensors_of(raw)


def test_parameters_are_as_many_as_published(model):
    raw, published = model
    assert count_parameters(ModelConfig.from_hf(raw)) == published
    assert sum(math.prod(shape) for shape in tensors_of(raw).values()) == published


@pytest.mark.parametrize(
    ("raw", "parameters"),
    [(LLAMA_3_70B, 1_242_562_560), (MIXTRAL_8X7B, 1_440_743_424)],
    ids=["LLaMA 3 70B", "Mixtral 8x7B"],
)
def test_the_papers_adapters_of_rank_96_reach_every_linear_layer_but_the_router(raw, parameters):
    config = ModelConfig.from_hf(raw)
    linear = [shape for name, shape in tensors_of(raw).items() if len(shape) == 2 and "layers" in name]
    by_hand = sum(96 * sum(shape) for shape in linear if shape[0] != raw.get("num_local_experts"))
    ours = sum(math.prod(shape) for row in target_rows(config) for shape in factor_shapes(config, row, 96).values())
    assert ours == by_hand == parameters
