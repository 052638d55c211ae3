"""THE table: every parameter's path, Hugging Face name, axes and layout, written once.

Modules declare their parameters from these rows; sharding, loading, exporting and LoRA placement read the same rows.
A parameter's shape follows from its logical axes, and so does its place on the mesh (`sharding.RULES`).
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
from flax import traverse_util

from derta_jax.models.config import ModelConfig

AXIS_SIZES: dict[str, Callable[[ModelConfig], int]] = {
    "layers": lambda c: c.layers,
    "vocab": lambda c: c.vocab_size,
    "embed": lambda c: c.embed_dim,
    "norm": lambda c: c.embed_dim,
    "heads": lambda c: c.heads * c.head_dim,
    "kv_heads": lambda c: c.kv_heads * c.head_dim,
    "ffn": lambda c: c.ffn_dim,
}


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
    def stacked(self) -> bool:
        """Whether the array holds all layers, stacked on its first axis."""
        return self.axes[0] == "layers"

    @property
    def transposed(self) -> bool:
        return len(self.axes) - self.stacked == 2 and self.name != "embed"

    def shape(self, config: ModelConfig) -> tuple[int, ...]:
        return tuple(AXIS_SIZES[axis](config) for axis in self.axes)

    def layer_shape(self, config: ModelConfig) -> tuple[int, ...]:
        """The shape inside one layer, as the scanned module declares it."""
        return self.shape(config)[self.stacked :]

    def hf_names(self, config: ModelConfig) -> list[str]:
        """The tensor names in a checkpoint, in layer order."""
        if not self.stacked:
            return [self.hf_name]
        return [self.hf_name.format(layer=layer) for layer in range(config.layers)]

    def hf_shape(self, config: ModelConfig) -> tuple[int, ...]:
        shape = self.layer_shape(config)
        return shape[::-1] if self.transposed else shape


def _layer(name: str, hf_module: str, *axes: str, lora: bool = False) -> Parameter:
    return Parameter(f"layers/{name}", f"model.layers.{{layer}}.{hf_module}.weight", ("layers", *axes), lora)


DECODER = (
    Parameter("embed", "model.embed_tokens.weight", ("vocab", "embed")),
    _layer("attention_norm", "input_layernorm", "norm"),
    _layer("query", "self_attn.q_proj", "embed", "heads", lora=True),
    _layer("key", "self_attn.k_proj", "embed", "kv_heads", lora=True),
    _layer("value", "self_attn.v_proj", "embed", "kv_heads", lora=True),
    _layer("output", "self_attn.o_proj", "heads", "embed", lora=True),
    _layer("ffn_norm", "post_attention_layernorm", "norm"),
    _layer("gate", "mlp.gate_proj", "embed", "ffn", lora=True),
    _layer("up", "mlp.up_proj", "embed", "ffn", lora=True),
    _layer("down", "mlp.down_proj", "ffn", "embed", lora=True),
    Parameter("norm", "model.norm.weight", ("norm",)),
    Parameter("head", "lm_head.weight", ("embed", "vocab")),
)

TABLES = {"llama": DECODER, "mistral": DECODER}
"""The table of each Hugging Face `model_type`."""


def parameter_table(config: ModelConfig) -> tuple[Parameter, ...]:
    """The rows of a model; a tied head has none of its own."""
    return tuple(row for row in TABLES[config.model_type] if not (config.tied_head and row.path == "head"))


def row(config: ModelConfig, path: str) -> Parameter:
    """The row of one parameter path."""
    return next(row for row in TABLES[config.model_type] if row.path == path)


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
    sizes = jax.tree.leaves(tree_from_rows(config, lambda row: jax.ShapeDtypeStruct(row.shape(config), "float32")))
    return sum(leaf.size for leaf in sizes)
