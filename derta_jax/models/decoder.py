"""The Llama and Mistral decoder in Flax Linen, used purely functionally: `Decoder(config).apply({"params": p}, ids)`.

Letters: B batch, T sequence, D model, H query heads, K kv heads, h head dim, F ffn, V vocabulary, L layers, S cache.
Layers are scanned, so compile time does not grow with depth. Numerically the transformers implementation of
`LlamaForCausalLM` and `MistralForCausalLM` is the reference.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from derta_jax.models import params as table
from derta_jax.models.attention import KVCache, attend, cache_mask, segment_mask
from derta_jax.models.config import ModelConfig
from derta_jax.models.rope import rotate, rotation
from derta_jax.models.sharding import constrain

REMAT_POLICIES = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "attention": jax.checkpoint_policies.save_only_these_names("qkv", "attention"),
    "full": jax.checkpoint_policies.nothing_saveable,
}
"""What a layer keeps for its backward pass: everything, its matrix products, q/k/v and attention, or only its input."""


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """Zhang & Sennrich, arXiv 1910.07467; float32 inside, x's dtype outside."""
    wide = x.astype(jnp.float32)
    normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return normed.astype(x.dtype) * scale.astype(x.dtype)


def _declare(module: nn.Module, config: ModelConfig, path: str) -> jax.Array:
    """The module's parameter of this table row: norms start at one, matrices at normal(initializer_range)."""
    row = table.row(config, path)
    init = nn.initializers.ones if row.axes[-1] == "norm" else nn.initializers.normal(config.initializer_range)
    return module.param(row.name, init, row.layer_shape(config), jnp.float32)


class Block(nn.Module):
    """One pre-norm layer: grouped-query attention, then SwiGLU."""

    config: ModelConfig
    dtype: Any

    @nn.compact
    def __call__(self, x, rope, mask, cache, column):
        """x [B, T, D] → x, and this layer's (keys, values) [B, S, K, h] when it was given them."""
        c = self.config
        B, T, _ = x.shape

        def weight(name: str) -> jax.Array:
            return _declare(self, c, f"layers/{name}").astype(self.dtype)

        normed = rms_norm(x, weight("attention_norm"), c.norm_eps)
        query = rotate((normed @ weight("query")).reshape(B, T, c.heads, c.head_dim), *rope)
        key = rotate((normed @ weight("key")).reshape(B, T, c.kv_heads, c.head_dim), *rope)
        value = (normed @ weight("value")).reshape(B, T, c.kv_heads, c.head_dim)
        query, key, value = (checkpoint_name(part, "qkv") for part in (query, key, value))
        if cache is not None:
            key, value = (
                jax.lax.dynamic_update_slice_in_dim(old, new, column, axis=1)
                for old, new in zip(cache, (key, value), strict=True)
            )
            cache = (key, value)
        attention = checkpoint_name(attend(query, key, value, mask), "attention")
        x = x + attention.reshape(B, T, c.heads * c.head_dim) @ weight("output")
        x = constrain(x, "batch", "sequence", "model")

        normed = rms_norm(x, weight("ffn_norm"), c.norm_eps)
        x = x + (nn.silu(normed @ weight("gate")) * (normed @ weight("up"))) @ weight("down")
        return constrain(x, "batch", "sequence", "model"), cache


class Decoder(nn.Module):
    """Token ids [B, T] → float32 logits [B, T, V].

    `dtype` is the compute dtype, `remat` a key of `REMAT_POLICIES`. Parameters are float32 unless cast by the caller.
    """

    config: ModelConfig
    dtype: Any = jnp.float32
    remat: str = "none"

    def setup(self):
        c = self.config
        self.embed = _declare(self, c, "embed")
        self.norm = _declare(self, c, "norm")
        if not c.tied_head:
            self.head = _declare(self, c, "head")
        policy = REMAT_POLICIES[self.remat]
        block = Block if policy is None else nn.remat(Block, policy=policy, prevent_cse=False)
        self.layers = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, nn.broadcast, 0, nn.broadcast),
            length=c.layers,
        )(c, self.dtype)

    def __call__(self, token_ids, segment_ids=None, positions=None):
        return self.logits(self.hidden_states(token_ids, segment_ids, positions))

    def hidden_states(self, token_ids, segment_ids=None, positions=None):
        """Normed states [B, T, D] before the head. Packed rows have their own segment id and restarted positions."""
        if segment_ids is None:
            segment_ids = jnp.ones_like(token_ids)
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(token_ids.shape[1]), token_ids.shape)
        mask = segment_mask(segment_ids, self.config.sliding_window)
        hidden, _ = self._run_layers(token_ids, positions, mask, None, None)
        return hidden

    def decode(self, token_ids, positions, cache: KVCache, column):
        """Append tokens [B, T] to the cache at `column` → (hidden [B, T, D], cache). Position -1 marks padding."""
        filled = jax.lax.dynamic_update_slice_in_dim(cache.positions, positions, column, axis=1)
        mask = cache_mask(positions, filled, self.config.sliding_window)
        hidden, (keys, values) = self._run_layers(token_ids, positions, mask, (cache.keys, cache.values), column)
        return hidden, KVCache(keys, values, filled)

    def logits(self, hidden):
        """Float32 logits [..., V] of hidden states [..., D]."""
        head = self.embed.T if self.config.tied_head else self.head
        return jnp.matmul(hidden, head.astype(self.dtype), preferred_element_type=jnp.float32)

    def _run_layers(self, token_ids, positions, mask, cache, column):
        x = constrain(self.embed.astype(self.dtype)[token_ids], "batch", "sequence", "model")
        x, cache = self.layers(x, rotation(self.config, positions), mask, cache, column)
        return rms_norm(x, self.norm, self.config.norm_eps), cache


def head_matrix(params: dict[str, Any]) -> jax.Array:
    """The output projection [D, V], also where it is tied to the embedding."""
    return params["head"] if "head" in params else params["embed"].T
