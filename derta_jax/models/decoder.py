"""The decoder in Flax Linen, used purely functionally: `Decoder(config).apply({"params": p}, ids)`.

Letters: B batch, T sequence, D model, H query heads, K kv heads, h head dim, F ffn, V vocabulary, L layers, S cache.
Layers are scanned, so compile time does not grow with depth; `unrolled` makes a model for answering of one that was
loaded. Numerically the transformers implementations of
`LlamaForCausalLM`, `MistralForCausalLM`, `MixtralForCausalLM` and `Qwen3ForCausalLM` are the reference.

Beside `params` it knows the collections of `lora.py` and `quantise.py`, and writes two that are mutable: `router`, of a
mixture of experts, and `residual`, each layer's output.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import NamedSharding, PartitionSpec

from derta_jax.models import params as table
from derta_jax.models.attention import (
    BRANCH,
    KVCache,
    attend,
    attend_by_kernel,
    attend_to_cache,
    cache_mask,
    segment_mask,
    tree_mask,
    tree_passes,
)
from derta_jax.models.config import ModelConfig
from derta_jax.models.lora import low_rank
from derta_jax.models.moe import gated, mix_experts, route, router_statistics
from derta_jax.models.quantise import COLLECTION as NF4
from derta_jax.models.quantise import unpack
from derta_jax.models.remat import REMAT_POLICIES
from derta_jax.models.rope import rotate, rotation
from derta_jax.models.sharding import constrain, gathered, mesh_axis_size


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """Zhang & Sennrich, arXiv 1910.07467; float32 inside, where `scale`'s gradient is summed; x's dtype outside."""
    wide = x.astype(jnp.float32)
    normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return (normed * scale).astype(x.dtype)


def _declare(module: nn.Module, config: ModelConfig, path: str) -> jax.Array:
    """The module's parameter of this table row: norms start at one, matrices at normal(initializer_range)."""
    row = table.row(config, path)
    init = nn.initializers.ones if row.name.endswith("norm") else nn.initializers.normal(config.initializer_range)
    return module.param(row.name, init, row.layer_shape(config), jnp.float32)


class Block(nn.Module):
    """One pre-norm layer: grouped-query attention, then SwiGLU, or a mixture of such experts."""

    config: ModelConfig
    dtype: Any
    lora_dropout: float
    attention: str

    @nn.compact
    def __call__(self, x, rope, mask, segment_ids, trunk=None, cached=None, column=None, keep=False):
        """x [B, T, D] → x, and the layer's keys [B, K, h, S] and values [B, K, S, h] where they are wanted.

        `segment_ids` [B, T] is 0 for padding. Without a `mask` the kernel of that name attends within segments, and
        from branches to the `trunk` before them. Those
        of x are wanted with `keep`. With a `cached` pair, x is one token a row: its own go to `column`, and it attends
        to what is there then; an array that something else read, too, would be copied for it.
        """
        c = self.config
        B, T, _ = x.shape
        x = checkpoint_name(x, "layer_input")
        normed = rms_norm(x, self.weight("attention_norm"), c.norm_eps)
        query = self.project(normed, "query", c.heads)
        key, value = (self.project(normed, name, c.kv_heads) for name in ("key", "value"))
        if table.has_row(c, "layers/query_norm"):
            query = rms_norm(query, self.weight("query_norm"), c.norm_eps)
            key = rms_norm(key, self.weight("key_norm"), c.norm_eps)
        query, key = rotate(query, *rope), rotate(key, *rope)
        query, key, value = (checkpoint_name(part, "qkv") for part in (query, key, value))
        pair = (key.swapaxes(2, 3), value) if keep else None
        if cached is not None:
            keys = jax.lax.dynamic_update_slice_in_dim(cached[0], key.swapaxes(2, 3), column, axis=3)
            values = jax.lax.dynamic_update_slice_in_dim(cached[1], value, column, axis=2)
            pair = (keys, values)
            attention = attend_to_cache(query, keys, values, mask)
        else:
            query, key, value = (part.swapaxes(1, 2) for part in (query, key, value))
            if mask is None:
                attend_within = functools.partial(attend_by_kernel, self.attention, query, key, value)
                if trunk is None:
                    attention = attend_within(segment_ids, c.sliding_window)
                else:
                    alone, joined = (attend_within(ids, c.sliding_window) for ids in tree_passes(segment_ids, trunk))
                    attention = jnp.where((trunk == BRANCH)[..., None, None], joined, alone)
            else:
                attention = attend(query, key, value, mask)
        x = x + self.project(attention, "output")
        x = constrain(x, "batch", "sequence", "model")

        normed = rms_norm(x, self.weight("ffn_norm"), c.norm_eps)
        x = x + (self.mixture(normed, segment_ids > 0) if c.experts else self.swiglu(normed))
        x = constrain(x, "batch", "sequence", "model")
        if not self.is_initializing():
            self.sow("residual", "output", x)
        return x, pair

    def weight(self, name):
        """This layer's parameter of that name, in the compute dtype, and whole but for the `tensor` axis."""
        if self.has_variable(NF4, name):
            weight = unpack(self.get_variable(NF4, name))
        else:
            weight = _declare(self, self.config, f"layers/{name}")
        axes = table.row(self.config, f"layers/{name}").axes[1:]
        return gathered(weight.astype(self.dtype), *axes)

    def project(self, x, name, heads=None):
        """x [B, T, in] through the linear layer of that name and its adapters → [B, T, out].

        x may be [B, T, H, h] with H h = in. With `heads` → [B, heads, T, out / heads]. Heads come out of a product, and
        go into one, as attention has them: a transpose of its own is a pass over memory.
        """

        alone = x.shape[1] == 1
        whole = mesh_axis_size("batch") == 1
        if alone:
            # one token a row has nothing to turn around; XLA:CPU would turn the weight
            x = x.reshape(len(x), 1, -1)

        def times(x, weight):
            if x.ndim == 4:
                return jnp.einsum("BTHh,HhD->BTD", x, weight.reshape(*x.shape[2:], -1))
            if heads and not alone:
                return jnp.einsum("BTD,DHh->BHTh", x, weight.reshape(len(weight), heads, -1))
            if whole:
                # the weight's gradient then contracts one axis; for two of them XLA:CPU would turn both operands
                return (x.reshape(-1, x.shape[-1]) @ weight).reshape(*x.shape[:-1], -1)
            return x @ weight

        y = times(x, self.weight(name))
        for adapter in low_rank(self, name, x.shape, self.dtype, self.lora_dropout):
            low = times(adapter.dropped(x), adapter.a) if x.ndim == 4 else adapter.dropped(x) @ adapter.a
            y = y + (low @ adapter.b if x.ndim == 4 else times(low, adapter.b))
        return y.reshape(len(y), heads, 1, -1) if heads and alone else y

    def swiglu(self, x):
        gate, up = (self.project(x, name) for name in ("gate", "up"))
        # XLA:TPU would compute this anew for each tile of the products that read it
        hidden = jax.lax.optimization_barrier(gated(gate, up))
        return self.project(hidden, "down")

    def mixture(self, x, real):
        c = self.config
        routing = route(x, _declare(self, c, "layers/router"), c.experts_per_token)
        if not self.is_initializing():
            self.sow("router", "statistics", router_statistics(routing, real))
        weights = {name: self.weight(name) for name in ("gate", "up", "down")}
        adapters = {
            name: low_rank(self, name, (*routing.chosen.shape, weight.shape[1]), self.dtype, self.lora_dropout)
            for name, weight in weights.items()
        }
        return mix_experts(x, routing, weights, adapters)


class Decoder(nn.Module):
    """Token ids [B, T] → float32 logits [B, T, V].

    `dtype` is the compute dtype, `remat` a key of `REMAT_POLICIES`, `attention` one of `attention.IMPLEMENTATIONS` (but
    a cache is always attended to by XLA's). Training scans the layers, and `unroll` writes the scan out; a model that
    answers is `unrolled`. Parameters are float32 unless cast by the caller.
    Adapters' inputs are dropped at the rate `lora_dropout` when `apply` is given a `dropout` random key.
    """

    config: ModelConfig
    dtype: Any = jnp.float32
    remat: str = "none"
    lora_dropout: float = 0.0
    attention: str = "xla"
    unroll: bool = False
    scan_layers: bool = True

    def setup(self):
        c = self.config
        self.embed = _declare(self, c, "embed")
        self.norm = _declare(self, c, "norm")
        if not c.tied_head:
            self.head = _declare(self, c, "head")
        if not self.scan_layers:
            self.layers: Any = [Block(c, self.dtype, self.lora_dropout, self.attention) for _ in range(c.layers)]
            return
        policy = REMAT_POLICIES[self.remat]
        # within a loop nothing is common to the forward and the backward pass
        block = Block if policy is None else nn.remat(Block, policy=policy, prevent_cse=self.unroll)
        self.layers = nn.scan(
            block,
            variable_axes={"params": 0, "lora": 0, NF4: 0, "router": 0, "residual": 0},
            variable_broadcast="lora_scale",
            split_rngs={"params": True, "dropout": True},
            in_axes=nn.broadcast,
            length=c.layers,
            unroll=c.layers if self.unroll else 1,
        )(c, self.dtype, self.lora_dropout, self.attention)

    def __call__(self, token_ids, segment_ids=None, positions=None, trunk=None):
        return self.logits(self.hidden_states(token_ids, segment_ids, positions, trunk))

    def hidden_states(self, token_ids, segment_ids=None, positions=None, trunk=None):
        """Normed states [B, T, D] before the head. Packed rows have their own segment id and restarted positions.

        `trunk` [B, T] says which tokens are seen by the next segment, too (1), and which see them (2).
        """
        if segment_ids is None:
            segment_ids = jnp.ones_like(token_ids)
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(token_ids.shape[1]), token_ids.shape)
        mask = None
        if self.attention == "xla":
            window = self.config.sliding_window
            mask = segment_mask(segment_ids, window)
            if trunk is not None:
                mask = tree_mask(segment_ids, positions, trunk, window)
        x, rope = self._enter(token_ids, positions)
        if self.scan_layers:
            x, _ = self.layers(x, rope, mask, segment_ids, trunk)
        else:
            for layer in self.layers:
                x, _ = layer(x, rope, mask, segment_ids, trunk)
        return rms_norm(x, self.norm, self.config.norm_eps)

    def read(self, token_ids, positions):
        """Prompts [B, T], position -1 for padding → (hidden [B, T, D], a cache of T columns). For unrolled layers."""
        segment_ids = (positions >= 0).astype(jnp.int32)
        mask = segment_mask(segment_ids, self.config.sliding_window)
        x, rope = self._enter(token_ids, positions)
        pairs = []
        for layer in self.layers:
            x, pair = layer(x, rope, mask, segment_ids, keep=True)
            pairs.append(pair)
        keys, values = zip(*pairs, strict=True)
        return rms_norm(x, self.norm, self.config.norm_eps), KVCache(keys, values, positions)

    def decode(self, token_ids, positions, cache: KVCache, column):
        """One token a row [B], written to `column` of the cache and attending to all of it → (hidden [B, D], cache).

        Position -1 is that of a row without a token. For unrolled layers.
        """
        positions = positions[:, None]
        seen = jax.lax.dynamic_update_slice_in_dim(cache.positions, positions, column, axis=1)
        mask = cache_mask(positions, seen, self.config.sliding_window)
        x, rope = self._enter(token_ids[:, None], positions)
        pairs = []
        for layer, *cached in zip(self.layers, cache.keys, cache.values, strict=True):
            x, pair = layer(x, rope, mask, positions >= 0, cached=cached, column=column)
            pairs.append(pair)
        keys, values = zip(*pairs, strict=True)
        return rms_norm(x, self.norm, self.config.norm_eps)[:, 0], KVCache(keys, values, seen)

    def logits(self, hidden):
        """Float32 logits [..., V] of hidden states [..., D]."""
        head = (self.embed.T if self.config.tied_head else self.head).astype(self.dtype)
        if hidden.ndim == 2 and not self.config.tied_head:
            return jax.lax.platform_dependent(hidden, head, cpu=_few_states_first, default=_states_first)
        return _states_first(hidden, head)

    def _enter(self, token_ids, positions):
        # narrowed after it is looked up: a token's gradients, of which there can be thousands, are summed in float32
        x = constrain(self.embed[token_ids].astype(self.dtype), "batch", "sequence", "model")
        return x, rotation(self.config, positions)


def _states_first(hidden: jax.Array, head: jax.Array) -> jax.Array:
    return jnp.matmul(hidden, head, preferred_element_type=jnp.float32)


def _few_states_first(hidden: jax.Array, head: jax.Array) -> jax.Array:
    """The same of few states [B, D]: XLA:CPU takes a quarter less time where its left operand lies this way round."""
    turned = jax.lax.optimization_barrier(hidden.T)
    return jnp.einsum("DB,DV->BV", turned, head, preferred_element_type=jnp.float32)


def unrolled(model: Decoder, params: dict[str, Any]) -> tuple[Decoder, dict[str, Any]]:
    """The model with a module for each layer, and its parameters: the stacked ones, which it takes over one by one.

    A scan cuts each layer's weights and cache out of a stack before it reads them, and at one token a row reading is
    all there is to do; in training it costs nothing.
    """
    if not model.scan_layers:
        return model, params
    layers: list[dict[str, Any]] = [{} for _ in range(model.config.layers)]
    for name, stacked in params["layers"].items():
        for layer, weight in zip(layers, jax.block_until_ready(_by_layer(stacked)), strict=True):
            layer[name] = weight
        stacked.delete()
    rest = {name: array for name, array in params.items() if name != "layers"}
    return model.clone(scan_layers=False), rest | {f"layers_{place}": layer for place, layer in enumerate(layers)}


def _by_layer(stacked: jax.Array) -> list[jax.Array]:
    placed = stacked.sharding
    if isinstance(placed, NamedSharding):
        placed = NamedSharding(placed.mesh, PartitionSpec(*placed.spec[1:]))
    return jax.jit(lambda stacked: [*stacked], out_shardings=placed)(stacked)


def head_matrix(params: dict[str, Any]) -> jax.Array:
    """The output projection [D, V], also where it is tied to the embedding."""
    return params["head"] if "head" in params else params["embed"].T
