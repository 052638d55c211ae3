"""THE table: every parameter's path, Hugging Face name, axes and layout, written once.

Modules declare their parameters from these rows; sharding, loading, exporting and LoRA placement read the same rows.
A parameter's shape follows from its logical axes, and so does its place on the mesh (`sharding.RULES`).
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

from flax import traverse_util

from derta_jax.models.config import ModelConfig

AXIS_SIZES: dict[str, Callable[[ModelConfig], int]] = {
    "layers": lambda c: c.layers,
    "vocab": lambda c: c.vocab_size,
    "embed": lambda c: c.embed_dim,
    "norm": lambda c: c.embed_dim,
    "heads": lambda c: c.heads * c.head_dim,
    "kv_heads": lambda c: c.kv_heads * c.head_dim,
    "head_norm": lambda c: c.head_dim,
    "ffn": lambda c: c.ffn_dim,
    "experts": lambda c: c.experts,
    "router": lambda c: c.experts,
    "expert_embed": lambda c: c.embed_dim,
}

STACKED_AXES = {"layers": "layer", "experts": "expert"}
"""Axes along which we stack what Hugging Face keeps as one tensor each, and what its names call them."""


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One row. `axes` are those of our array; Hugging Face stores linear layers transposed, one tensor a layer."""

    path: str
    hf_name: str
    axes: tuple[str, ...]
    lora: bool = False

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]

    @property
    def stacked(self) -> int:
        """How many leading axes of the array stack Hugging Face's tensors: layers, layers and experts, or none."""
        return sum(axis in STACKED_AXES for axis in self.axes)

    @property
    def transposed(self) -> bool:
        return len(self.axes) - self.stacked == 2 and self.name != "embed"

    @property
    def hf_module(self) -> str:
        """What PEFT calls the linear layer: `q_proj`, `w1`, …"""
        return self.hf_name.split(".")[-2]

    def shape(self, config: ModelConfig) -> tuple[int, ...]:
        return tuple(AXIS_SIZES[axis](config) for axis in self.axes)

    def layer_shape(self, config: ModelConfig) -> tuple[int, ...]:
        """The shape inside one layer, as the scanned module declares it."""
        return self.shape(config)[self.axes[0] == "layers" :]

    def hf_names(self, config: ModelConfig) -> dict[tuple[int, ...], str]:
        """Where each tensor of a checkpoint lies in our array, and its name: `array[index]` is one tensor."""
        stacks = self.axes[: self.stacked]
        places = itertools.product(*(range(size) for size in self.shape(config)[: self.stacked]))
        words = [STACKED_AXES[axis] for axis in stacks]
        return {place: self.hf_name.format(**dict(zip(words, place, strict=True))) for place in places}

    def hf_shape(self, config: ModelConfig) -> tuple[int, ...]:
        shape = self.shape(config)[self.stacked :]
        return shape[::-1] if self.transposed else shape


def _layer(name: str, hf_module: str, *axes: str, lora: bool = False) -> Parameter:
    return Parameter(f"layers/{name}", f"model.layers.{{layer}}.{hf_module}.weight", ("layers", *axes), lora)


ATTENTION = (
    Parameter("embed", "model.embed_tokens.weight", ("vocab", "embed")),
    _layer("attention_norm", "input_layernorm", "norm"),
    _layer("query", "self_attn.q_proj", "embed", "heads", lora=True),
    _layer("key", "self_attn.k_proj", "embed", "kv_heads", lora=True),
    _layer("value", "self_attn.v_proj", "embed", "kv_heads", lora=True),
    _layer("output", "self_attn.o_proj", "heads", "embed", lora=True),
    _layer("ffn_norm", "post_attention_layernorm", "norm"),
)
SWIGLU = (
    _layer("gate", "mlp.gate_proj", "embed", "ffn", lora=True),
    _layer("up", "mlp.up_proj", "embed", "ffn", lora=True),
    _layer("down", "mlp.down_proj", "ffn", "embed", lora=True),
)
MIXTURE = (
    _layer("router", "block_sparse_moe.gate", "embed", "router"),
    _layer("gate", "block_sparse_moe.experts.{expert}.w1", "experts", "expert_embed", "ffn", lora=True),
    _layer("up", "block_sparse_moe.experts.{expert}.w3", "experts", "expert_embed", "ffn", lora=True),
    _layer("down", "block_sparse_moe.experts.{expert}.w2", "experts", "ffn", "expert_embed", lora=True),
)
HEAD_NORMS = (
    _layer("query_norm", "self_attn.q_norm", "head_norm"),
    _layer("key_norm", "self_attn.k_norm", "head_norm"),
)
OUTPUT = (
    Parameter("norm", "model.norm.weight", ("norm",)),
    Parameter("head", "lm_head.weight", ("embed", "vocab")),
)

DECODER = (*ATTENTION, *SWIGLU, *OUTPUT)

TABLES = {
    "llama": DECODER,
    "mistral": DECODER,
    "mixtral": (*ATTENTION, *MIXTURE, *OUTPUT),
    "qwen3": (*ATTENTION, *HEAD_NORMS, *SWIGLU, *OUTPUT),
}
"""The table of each Hugging Face `model_type`."""


def parameter_table(config: ModelConfig) -> tuple[Parameter, ...]:
    """The rows of a model; a tied head has none of its own."""
    return tuple(row for row in TABLES[config.model_type] if not (config.tied_head and row.path == "head"))


def row(config: ModelConfig, path: str) -> Parameter:
    """The row of one parameter path."""
    return next(row for row in TABLES[config.model_type] if row.path == path)


def has_row(config: ModelConfig, path: str) -> bool:
    """Whether the family has such a parameter."""
    return any(row.path == path for row in TABLES[config.model_type])


def tree_from_rows(config: ModelConfig, make: Callable[[Parameter], Any]) -> dict[str, Any]:
    """A parameter tree whose leaves are `make(row)`."""
    return traverse_util.unflatten_dict({row.path: make(row) for row in parameter_table(config)}, sep="/")


def leaves_with_rows(config: ModelConfig, params: dict[str, Any]) -> Iterator[tuple[Parameter, Any]]:
    """Each row with its array in `params`."""
    flat = traverse_util.flatten_dict(params, sep="/")
    for row in parameter_table(config):
        yield row, flat[row.path]


def count_parameters(config: ModelConfig) -> int:
    """How many numbers a model has."""
    return sum(math.prod(row.shape(config)) for row in parameter_table(config))
