"""What a config.json says, in every spelling it comes in."""

import pytest
from transformers import AutoConfig

from derta_jax.errors import UserError
from derta_jax.models.config import ModelConfig, RopeScaling

SIZES = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-4,
    "max_position_embeddings": 512,
    "initializer_range": 0.05,
}
LLAMA = {"model_type": "llama", "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": True} | SIZES
MIXTRAL = {
    "model_type": "mixtral",
    "sliding_window": None,
    "tie_word_embeddings": False,
    "num_local_experts": 4,
    "num_experts_per_tok": 3,
    "router_aux_loss_coef": 0.02,
} | SIZES
MISTRAL = {"model_type": "mistral", "sliding_window": 128, "tie_word_embeddings": False} | SIZES
QWEN3 = {"model_type": "qwen3", "use_sliding_window": False, "tie_word_embeddings": True} | SIZES
LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
TRANSFORMERS_4 = {"rope_theta": 500_000.0, "rope_scaling": None, "torch_dtype": "bfloat16"}
TRANSFORMERS_5 = {"rope_parameters": {"rope_theta": 500_000.0, "rope_type": "default"}, "dtype": "bfloat16"}
LLAMA3_IN_TRANSFORMERS_4 = {"rope_theta": 500_000.0, "rope_scaling": LLAMA3_SCALING}
LLAMA3_IN_TRANSFORMERS_5 = {"rope_parameters": {"rope_theta": 500_000.0} | LLAMA3_SCALING}


def without(raw: dict, *keys: str) -> dict:
    return {key: value for key, value in raw.items() if key not in keys}


def test_every_size_and_constant_is_read():
    assert ModelConfig.from_hf(MISTRAL | TRANSFORMERS_5) == ModelConfig(
        model_type="mistral",
        vocab_size=320,
        embed_dim=64,
        ffn_dim=96,
        layers=3,
        heads=8,
        kv_heads=2,
        head_dim=16,
        norm_eps=1e-4,
        rope_theta=500_000.0,
        rope_scaling=None,
        sliding_window=128,
        tied_head=False,
        max_positions=512,
        initializer_range=0.05,
    )


@pytest.mark.parametrize("family", [LLAMA, MISTRAL], ids=["llama", "mistral"])
@pytest.mark.parametrize(
    ("old", "new"),
    [(TRANSFORMERS_4, TRANSFORMERS_5), (LLAMA3_IN_TRANSFORMERS_4, LLAMA3_IN_TRANSFORMERS_5)],
    ids=["plain rope", "llama3 rope"],
)
def test_transformers_4_and_5_spell_the_same_config(family, old, new):
    assert ModelConfig.from_hf(family | old) == ModelConfig.from_hf(family | new)


def test_llama3_scaling_is_read():
    config = ModelConfig.from_hf(LLAMA | LLAMA3_IN_TRANSFORMERS_4)
    assert config.rope_scaling == RopeScaling(8.0, 1.0, 4.0, 64)
    assert config.rope_theta == 500_000.0


def test_rope_settings_that_are_absent_are_the_plain_ones():
    config = ModelConfig.from_hf(LLAMA)
    assert (config.rope_theta, config.rope_scaling) == (10_000.0, None)


@pytest.mark.parametrize("raw", [without(LLAMA, "head_dim"), LLAMA | {"head_dim": None}], ids=["absent", "null"])
def test_the_head_dimension_defaults_to_an_even_split(raw):
    assert ModelConfig.from_hf(raw).head_dim == 64 // 8


def test_without_kv_heads_llama_has_one_for_each_head():
    assert ModelConfig.from_hf(without(LLAMA, "num_key_value_heads")).kv_heads == 8


@pytest.mark.parametrize("window", [None, 128])
def test_mistral_has_the_window_that_its_config_names(window):
    assert ModelConfig.from_hf(MISTRAL | {"sliding_window": window}).sliding_window == window


def test_the_experts_of_a_mixture_are_read():
    config = ModelConfig.from_hf(MIXTRAL)
    assert (config.experts, config.experts_per_token, config.router_aux_coef) == (4, 3, 0.02)


def test_llama_has_no_window():
    assert ModelConfig.from_hf(LLAMA | {"sliding_window": 128}).sliding_window is None


@pytest.mark.parametrize("family", ["llama", "mistral", "mixtral", "qwen3"])
def test_what_a_config_leaves_out_is_what_transformers_assumes(family):
    sizes = without(SIZES, "num_key_value_heads", "head_dim", "rms_norm_eps", "initializer_range")
    sizes = without(sizes, "max_position_embeddings", "hidden_act") | {"num_attention_heads": 32}
    assumed = AutoConfig.for_model(family, **sizes).to_dict()
    assert ModelConfig.from_hf({"model_type": family} | sizes) == ModelConfig.from_hf(assumed)


@pytest.mark.parametrize(
    "raw",
    [
        LLAMA,
        LLAMA | LLAMA3_IN_TRANSFORMERS_5,
        MISTRAL | TRANSFORMERS_5,
        MISTRAL | {"sliding_window": None},
        MIXTRAL | TRANSFORMERS_5,
        QWEN3 | TRANSFORMERS_5,
    ],
    ids=["llama", "llama3 rope", "mistral", "mistral without a window", "mixtral", "qwen3"],
)
def test_a_written_config_reads_back_the_same_here_and_through_transformers(raw, tmp_path):
    config = ModelConfig.from_hf(raw)
    written = config.to_hf()
    assert ModelConfig.from_hf(written) == config
    AutoConfig.for_model(**written).save_pretrained(tmp_path)
    assert ModelConfig.from_hf(AutoConfig.from_pretrained(tmp_path).to_dict()) == config


def test_an_unknown_model_type_is_refused_with_the_known_ones():
    with pytest.raises(UserError, match="model_type is 'gpt2'; supported: llama, mistral, mixtral, qwen3"):
        ModelConfig.from_hf(LLAMA | {"model_type": "gpt2"}, "there/config.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention_bias": True}, "attention_bias: True is not supported, only False"),
        ({"mlp_bias": True}, "mlp_bias: True is not supported, only False"),
        ({"hidden_act": "gelu"}, "hidden_act: 'gelu' is not supported, only 'silu'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope type 'linear' is not supported"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope type 'yarn' is not supported"),
        ({"rope_scaling": without(LLAMA3_SCALING, "factor")}, "llama3 rope scaling lacks factor"),
        ({"vocab_size": None}, "vocab_size must be a positive integer"),
        ({"num_hidden_layers": "three"}, "num_hidden_layers must be a positive integer"),
        ({"num_key_value_heads": 3}, "8 query heads cannot share 3 kv heads evenly"),
        ({"num_attention_heads": 5, "head_dim": None}, "hidden_size 64 does not split into 5 heads"),
        ({"num_key_value_heads": "2"}, "num_key_value_heads must be a positive integer"),
        (QWEN3 | {"use_sliding_window": True}, "use_sliding_window: True is not supported, only False"),
        (MIXTRAL | {"num_experts_per_tok": 5}, "num_experts_per_tok 5 is more than the 4 experts there are"),
        (MIXTRAL | {"num_local_experts": 0}, "num_local_experts must be a positive integer"),
        (MIXTRAL | {"router_jitter_noise": 0.1}, r"router_jitter_noise: 0\.1 is not supported, only 0\.0"),
        (MIXTRAL | {"norm_topk_prob": False}, "norm_topk_prob: False is not supported, only True"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_the_decoder_does_not_compute_is_refused(change, message):
    with pytest.raises(UserError, match=message):
        ModelConfig.from_hf(LLAMA | change)


def test_all_problems_are_listed_at_once_under_the_files_name():
    wrong = {
        "vocab_size": 0,
        "attention_bias": True,
        "hidden_act": "relu",
        "num_key_value_heads": 3,
        "rope_scaling": {"rope_type": "dynamic"},
    }
    with pytest.raises(UserError) as error:
        ModelConfig.from_hf(LLAMA | wrong, "there/config.json")
    first, *problems = str(error.value).splitlines()
    assert first == "there/config.json:"
    assert len(problems) == len(wrong)
