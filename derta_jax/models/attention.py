"""Who may look at whom (causality, segments, sliding windows), the key-value cache, and the attention product."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from derta_jax.models.config import ModelConfig


class KVCache(NamedTuple):
    """Keys and values of all layers [L, B, S, K, h]; `positions` [B, S] is -1 where a column is empty."""

    keys: jax.Array
    values: jax.Array
    positions: jax.Array


def empty_cache(config: ModelConfig, batch: int, length: int, dtype: jnp.dtype) -> KVCache:
    """A cache of `length` columns, none of them filled."""
    shape = (config.layers, batch, length, config.kv_heads, config.head_dim)
    return KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.full((batch, length), -1, jnp.int32))


def segment_mask(segment_ids: jax.Array, window: int | None) -> jax.Array:
    """Bool [B, 1, T, T]: causal, within the same segment, fewer than `window` tokens back. Segment 0 is padding."""
    columns = jnp.arange(segment_ids.shape[1])
    distance = columns[:, None] - columns[None, :]
    causal = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    return (causal & same)[:, None]


def cache_mask(query_positions: jax.Array, key_positions: jax.Array, window: int | None) -> jax.Array:
    """Bool [B, 1, T, S]: filled columns at or before each query's position, fewer than `window` back."""
    distance = query_positions[:, :, None] - key_positions[:, None, :]
    visible = (distance >= 0) & (key_positions >= 0)[:, None, :]
    if window is not None:
        visible &= distance < window
    return visible[:, None]


def attend(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array) -> jax.Array:
    """Grouped-query attention: query [B, T, H, h], key and value [B, S, K, h] → [B, T, H, h], softmax in float32."""
    return jax.nn.dot_product_attention(query, key, value, mask=mask, implementation="xla")
