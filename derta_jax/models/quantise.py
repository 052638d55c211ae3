"""Frozen weights in 4 bits beneath adapters: QLoRA (Dettmers et al., arXiv 2305.14314), by the library qwix.

NF4 codes in blocks of 64 along the input axis, one bfloat16 scale a block: 4.25 bits a weight. The linear layers that
adapters may go on move from `params` to a collection of their own; each layer unpacks its weights when it needs them.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from derta_jax.errors import UserError
from derta_jax.models.config import ModelConfig
from derta_jax.models.lora import target_rows
from derta_jax.models.params import Parameter
from derta_jax.models.sharding import partition_spec

COLLECTION = "nf4"
BLOCK = 64


def check_quantisable(config: ModelConfig) -> None:
    """Raise `UserError` where qwix is not installed, or a linear layer does not divide into blocks."""
    _qwix()
    for row in target_rows(config):
        inputs = row.shape(config)[-2]
        if inputs % BLOCK:
            raise UserError(f"lora.quantise: {row.hf_module} has {inputs} inputs, not a multiple of a block's {BLOCK}")


def quantise(config: ModelConfig, params: Any, mesh: Mesh) -> dict[str, Any]:
    """The collections `params`, without the linear layers, and `nf4` with them; takes the parameters over.

    Raises `UserError` as `check_quantisable` does.
    """
    check_quantisable(config)

    def pack(row: Parameter, weight: jax.Array) -> Any:
        shardings = _shardings(jax.eval_shape(_packer(row), weight), row, mesh)
        codes = jax.block_until_ready(jax.jit(_packer(row), out_shardings=shardings)(weight))
        weight.delete()
        return codes

    return _with_linear_layers(config, params, pack)


def abstract_quantised(config: ModelConfig, params: Any, mesh: Mesh) -> dict[str, Any]:
    """The shapes, dtypes and shardings of what `quantise` makes of parameters with these."""

    def pack(row: Parameter, weight: jax.ShapeDtypeStruct) -> Any:
        codes = jax.eval_shape(_packer(row), weight)
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            codes,
            _shardings(codes, row, mesh),
        )

    return _with_linear_layers(config, params, pack)


def _with_linear_layers(config: ModelConfig, params: Any, pack: Callable[[Parameter, Any], Any]) -> dict[str, Any]:
    flat = traverse_util.flatten_dict(params, sep="/")
    codes = {row.path: pack(row, flat.pop(row.path)) for row in target_rows(config)}
    return {
        "params": traverse_util.unflatten_dict(flat, sep="/"),
        COLLECTION: traverse_util.unflatten_dict(codes, sep="/"),
    }


def _packer(row: Parameter) -> Callable[[Any], Any]:
    inputs = len(row.axes) - 2
    return functools.partial(
        _qwix().quantize,
        qtype="nf4",
        channelwise_axes=tuple(axis for axis in range(len(row.axes)) if axis != inputs),
        tiled_axes={inputs: BLOCK},
        scale_dtype=jnp.bfloat16,
    )


def unpack(codes: Any) -> jax.Array:
    """The weight that `quantise` packed, in bfloat16."""
    return _qwix().dequantize(codes)


def _shardings(abstract: Any, row: Parameter, mesh: Mesh) -> Any:
    """Codes lie as the weight would; scales too, but for an axis with fewer blocks than devices."""
    spec = partition_spec(row.axes)

    def sharding(leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        axes = [name if size % _devices(mesh, name) == 0 else None for size, name in zip(leaf.shape, spec, strict=True)]
        return NamedSharding(mesh, PartitionSpec(*axes))

    return jax.tree.map(sharding, abstract)


def _devices(mesh: Mesh, names: str | tuple[str, ...] | None) -> int:
    names = (names,) if isinstance(names, str) else names or ()
    return math.prod(mesh.shape[name] for name in names)


def _qwix() -> Any:
    try:
        import qwix
    except ImportError as error:
        raise UserError("lora.quantise needs qwix: pip install 'derta-jax[qlora]'") from error
    return qwix
