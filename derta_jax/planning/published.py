"""The architectures of published models, by hub id: a plan needs no weights, no network and no licence accepted."""

from typing import Any

from derta_jax.models.config import ModelConfig

LLAMA_3_8B: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 8192,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}
LLAMA_3_70B = LLAMA_3_8B | {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_attention_heads": 64,
    "num_hidden_layers": 80,
}
MISTRAL_7B_V01: dict[str, Any] = {
    "model_type": "mistral",
    "architectures": ["MistralForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 32000,
}
MISTRAL_7B_V03 = MISTRAL_7B_V01 | {"rope_theta": 1000000.0, "sliding_window": None, "vocab_size": 32768}
MIXTRAL_8X7B = MISTRAL_7B_V01 | {
    "model_type": "mixtral",
    "architectures": ["MixtralForCausalLM"],
    "num_experts_per_tok": 2,
    "num_local_experts": 8,
    "output_router_logits": False,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.02,
    "sliding_window": None,
}
QWEN_3_8B = LLAMA_3_8B | {
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "head_dim": 128,
    "intermediate_size": 12288,
    "max_position_embeddings": 40960,
    "max_window_layers": 36,
    "num_hidden_layers": 36,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000,
    "sliding_window": None,
    "use_sliding_window": False,
    "vocab_size": 151936,
}

PUBLISHED = {
    "meta-llama/Meta-Llama-3-8B": LLAMA_3_8B,
    "meta-llama/Meta-Llama-3-8B-Instruct": LLAMA_3_8B,
    "meta-llama/Meta-Llama-3-70B": LLAMA_3_70B,
    "meta-llama/Meta-Llama-3-70B-Instruct": LLAMA_3_70B,
    "mistralai/Mistral-7B-v0.1": MISTRAL_7B_V01,
    "mistralai/Mistral-7B-v0.3": MISTRAL_7B_V03,
    "mistralai/Mixtral-8x7B-v0.1": MIXTRAL_8X7B,
    "Qwen/Qwen3-8B": QWEN_3_8B,
}
"""What their `config.json` says, as far as it matters here."""


def architecture(path: str) -> ModelConfig:
    """Of a `model.path`: from the table above, else from its `config.json`. Raises `UserError` where there is none."""
    if path in PUBLISHED:
        return ModelConfig.from_hf(PUBLISHED[path], path)
    from derta_jax.interop.hf_load import read_model_config  # these take seconds to import
    from derta_jax.training.restore import find_files

    return read_model_config(find_files(path))
