"""The architecture of a model, read from and written to a Hugging Face `config.json`."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from derta_jax.errors import UserError

ASSUMED: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048},
    "mistral": {"max_position_embeddings": 131_072, "num_key_value_heads": 8, "sliding_window": 4096},
    "mixtral": {
        "max_position_embeddings": 131_072,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "router_aux_loss_coef": 0.001,
        "rms_norm_eps": 1e-5,
        "default_theta": 1e6,
    },
    "qwen3": {"max_position_embeddings": 32_768, "num_key_value_heads": 32, "head_dim": 128},
}
"""What transformers assumes where a `config.json` leaves a key out; null is not left out."""

MODEL_TYPES = tuple(ASSUMED)
"""Hugging Face `model_type`s that `decoder.Decoder` computes."""

WINDOWED = ("mistral", "mixtral")
"""Those whose `sliding_window` counts."""

ONLY = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "use_sliding_window": False,
    "norm_topk_prob": True,
    "router_jitter_noise": 0.0,
}
"""Keys that may be absent, and the one value that the decoder computes."""


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's frequency interpolation (`rope_type: llama3`): long wavelengths grow by `factor`."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


LLAMA3_KEYS = tuple(field.name for field in dataclasses.fields(RopeScaling))


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes and constants: D model, H query heads, K kv heads, h head dim, F ffn, V vocabulary, L, E experts."""

    model_type: str
    vocab_size: int
    embed_dim: int
    ffn_dim: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    sliding_window: int | None = None
    tied_head: bool = False
    max_positions: int = 8192
    initializer_range: float = 0.02
    experts: int = 0
    experts_per_token: int = 0
    router_aux_coef: float = 0.0

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any], source: str = "config.json") -> "ModelConfig":
        """Read `config.json` as transformers 4 (`rope_scaling`) or transformers 5 (`rope_parameters`) writes it.

        Raises `UserError` with every key that is missing or asks for something the decoder does not compute.
        """
        model_type = raw.get("model_type")
        if model_type not in MODEL_TYPES:
            raise UserError(f"{source}: model_type is {model_type!r}; supported: {', '.join(MODEL_TYPES)}")
        raw = ASSUMED[model_type] | dict(raw)
        rope = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
        if problems := [*_wrong_sizes(raw), *_unsupported(raw, rope)]:
            raise UserError(f"{source}:\n" + "\n".join(f"  {problem}" for problem in problems))

        llama3 = _rope_type(rope) == "llama3"
        scaling = RopeScaling(**{key: rope[key] for key in LLAMA3_KEYS}) if llama3 else None
        heads = raw["num_attention_heads"]
        return cls(
            model_type=model_type,
            vocab_size=raw["vocab_size"],
            embed_dim=raw["hidden_size"],
            ffn_dim=raw["intermediate_size"],
            layers=raw["num_hidden_layers"],
            heads=heads,
            kv_heads=raw.get("num_key_value_heads") or heads,
            head_dim=raw.get("head_dim") or raw["hidden_size"] // heads,
            norm_eps=raw.get("rms_norm_eps", 1e-6),
            rope_theta=float(rope.get("rope_theta") or raw.get("rope_theta") or raw.get("default_theta", 1e4)),
            rope_scaling=scaling,
            sliding_window=raw.get("sliding_window") if model_type in WINDOWED else None,
            tied_head=raw.get("tie_word_embeddings", False),
            max_positions=raw["max_position_embeddings"],
            initializer_range=raw.get("initializer_range", 0.02),
            experts=raw.get("num_local_experts", 0),
            experts_per_token=raw.get("num_experts_per_tok", 0),
            router_aux_coef=raw.get("router_aux_loss_coef", 0.0),
        )

    def to_hf(self) -> dict[str, Any]:
        """The `config.json` of a model that has no original to copy; both spellings of the rope settings."""
        rope: dict[str, Any] = {"rope_theta": self.rope_theta, "rope_type": "default"}
        if self.rope_scaling:
            rope |= {"rope_type": "llama3"} | dataclasses.asdict(self.rope_scaling)
        raw: dict[str, Any] = {
            "architectures": [f"{self.model_type.capitalize()}ForCausalLM"],
            "model_type": self.model_type,
            "vocab_size": self.vocab_size,
            "hidden_size": self.embed_dim,
            "intermediate_size": self.ffn_dim,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "rms_norm_eps": self.norm_eps,
            "rope_theta": self.rope_theta,
            "rope_parameters": rope,
            "tie_word_embeddings": self.tied_head,
            "max_position_embeddings": self.max_positions,
            "initializer_range": self.initializer_range,
        }
        if self.model_type in WINDOWED:
            raw["sliding_window"] = self.sliding_window
        if self.experts:
            raw["num_local_experts"] = self.experts
            raw["num_experts_per_tok"] = self.experts_per_token
            raw["router_aux_loss_coef"] = self.router_aux_coef
        return raw


OPTIONAL_SIZES = ("num_key_value_heads", "head_dim", "sliding_window", "num_local_experts", "num_experts_per_tok")


def _rope_type(rope: Mapping[str, Any]) -> str:
    return rope.get("rope_type", rope.get("type", "default"))


def _wrong_sizes(raw: Mapping[str, Any]) -> Iterator[str]:
    required = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    optional = [key for key in OPTIONAL_SIZES if raw.get(key) is not None]
    sizes = {key: raw.get(key) for key in (*required, *optional)}
    right = {key: size for key, size in sizes.items() if type(size) is int and size > 0}
    yield from (f"{key} must be a positive integer (got {sizes[key]!r})" for key in sizes if key not in right)
    heads, kv_heads, width = map(right.get, ("num_attention_heads", "num_key_value_heads", "hidden_size"))
    if heads and kv_heads and heads % kv_heads:
        yield f"{heads} query heads cannot share {kv_heads} kv heads evenly"
    experts, chosen = map(right.get, ("num_local_experts", "num_experts_per_tok"))
    if experts and chosen and chosen > experts:
        yield f"num_experts_per_tok {chosen} is more than the {experts} experts there are"
    if heads and width and width % heads and not raw.get("head_dim"):
        yield f"hidden_size {width} does not split into {heads} heads, and there is no head_dim"


def _unsupported(raw: Mapping[str, Any], rope: Mapping[str, Any]) -> Iterator[str]:
    for key, expected in ONLY.items():
        if raw.get(key, expected) != expected:
            yield f"{key}: {raw[key]!r} is not supported, only {expected!r}"
    if _rope_type(rope) not in ("default", "llama3"):
        yield f"rope type {_rope_type(rope)!r} is not supported, only 'default' and 'llama3'"
    elif _rope_type(rope) == "llama3" and (missing := [key for key in LLAMA3_KEYS if key not in rope]):
        yield f"llama3 rope scaling lacks {', '.join(missing)}"
