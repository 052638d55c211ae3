"""Attention in blocks, for CPUs: pairs of blocks that nobody sees are not computed, and no weights [T, T] are kept.

After FlashAttention-2 (arXiv 2307.08691): the softmax is summed up block by block, and the backward pass computes the
weights again from what it was normalised by. All sequences of a batch are one row of blocks of tokens; a block of
queries looks from the block where the first of its segments begins, or its window, up to itself.

In the backward pass values, and what is added up for keys and values, are [h, C], with which XLA:CPU is fastest.

Letters: N blocks, C tokens of each, K kv heads, X queries of a block that share one (heads × C), h head dim.
"""

import functools

import jax
import jax.numpy as jnp

BLOCK = 128
REGISTER = 16
"""Float32 numbers of a vector register."""
LOWEST = -1e30
"""Where no weight is; with infinity, a block without any would be inf - inf."""


def block_attention(query, key, value, segment_ids, window):
    """→ attention [B, T, H, h], and log Σ exp of the scores, float32 [B, T, H]."""
    ids, first = _blocks_of_ids(segment_ids), first_blocks(segment_ids, window)
    queries, keys, values = _split_queries(query, key), _split(key), _split(value)

    def one(_, inputs):
        place, mine = inputs

        def add(other, carried):
            highest, total, sums = carried
            scores = _scores(mine, keys[other], ids, place, other, window)
            higher = jnp.maximum(highest, _folded(jnp.maximum, scores).max(-1, keepdims=True))
            weights, shrink = jnp.exp(scores - higher), jnp.exp(highest - higher)
            total = total * shrink + _folded(jnp.add, weights).sum(-1, keepdims=True)
            return higher, total, sums * shrink + _product("KXC,KCh->KXh", weights.astype(value.dtype), values[other])

        column = (*mine.shape[:-1], 1)
        start = jnp.full(column, LOWEST), jnp.zeros(column), jnp.zeros(mine.shape)
        highest, total, sums = jax.lax.fori_loop(first[place], place + 1, add, start)
        return None, ((sums / total).astype(query.dtype), highest + jnp.log(total))

    _, (attention, statistics) = jax.lax.scan(one, None, (jnp.arange(len(queries)), queries))
    return _join_queries(attention, query), _join_queries(statistics, query)[..., 0]


def block_gradients(query, key, value, segment_ids, attention, statistics, grad, window):
    """→ those of query, key and value."""
    ids, first = _blocks_of_ids(segment_ids), first_blocks(segment_ids, window)
    queries, keys, values = _split_queries(query, key), _split(key), _turned(_split(value))
    grads, norms = _split_queries(grad, key), _split_queries(statistics[..., None], key)
    centre = _split_queries((attention.astype(jnp.float32) * grad).sum(-1, keepdims=True), key)
    scale = query.shape[-1] ** -0.5

    def one(totals, inputs):
        place, mine, turned, by_mine, by_turned, norm, middle = inputs

        def add(other, carried):
            by_query, (by_keys, by_values) = carried
            weights = jnp.exp(_scores(mine, keys[other], ids, place, other, window) - norm)
            by_values = by_values.at[other].add(_product("KhX,KXC->KhC", by_turned, weights.astype(value.dtype)))
            slopes = weights * (_product("KXh,KhC->KXC", by_mine, values[other]) - middle) * scale
            slopes = slopes.astype(query.dtype)
            by_keys = by_keys.at[other].add(_product("KhX,KXC->KhC", turned, slopes))
            return by_query + _product("KXC,KCh->KXh", slopes, keys[other]), (by_keys, by_values)

        start = jnp.zeros(mine.shape), totals
        by_query, totals = jax.lax.fori_loop(first[place], place + 1, add, start)
        return totals, by_query

    zeros = jnp.zeros(values.shape), jnp.zeros(values.shape)
    inputs = jnp.arange(len(queries)), queries, _turned(queries), grads, _turned(grads), norms, centre
    (by_keys, by_values), by_queries = jax.lax.scan(one, zeros, inputs)
    found = _join_queries(by_queries, query), _join(_turned(by_keys), key), _join(_turned(by_values), value)
    return tuple(part.astype(query.dtype) for part in found)


def _scores(mine, theirs, ids, place, other, window):
    """Of a block of queries [K, X, h] with a block of keys [K, C, h]: float32 [K, X, C]."""
    K, X, h = mine.shape
    C = theirs.shape[1]
    distance = (place - other) * C + jnp.arange(C)[:, None] - jnp.arange(C)
    seen = (distance >= 0) & (ids[place][:, None] == ids[other])
    if window is not None:
        seen &= distance < window
    scores = _product("KXh,KCh->KXC", mine, theirs) * h**-0.5
    return jnp.where(jnp.tile(seen, (X // C, 1)), scores, LOWEST)


def _folded(operation, x):
    """[…, C] → […, REGISTER], parts of the last axis under one another: XLA:CPU reduces that axis one by one."""
    return functools.reduce(operation, jnp.split(x, x.shape[-1] // REGISTER, axis=-1))


def _product(equation, a, b):
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)


def _blocks_of_ids(segment_ids):
    """[N, C], no id in two sequences."""
    apart = (segment_ids.max() + 1) * jnp.arange(len(segment_ids), dtype=jnp.int32)
    return _padded((segment_ids + apart[:, None])[..., None], -1).reshape(-1, BLOCK)


def first_blocks(segment_ids: jax.Array, window: int | None) -> jax.Array:
    """The first block that each block's tokens see, int32 [N], of segments [B, T]; of padding, its own."""
    ids = _blocks_of_ids(segment_ids).reshape(-1)
    places = jnp.arange(len(ids))
    # a segment need not stand side by side: the branch of a tree is apart from its trunk
    _, names = jnp.unique(ids, return_inverse=True, size=len(ids))
    begins = jax.ops.segment_min(places, names, num_segments=len(ids))
    padding = _padded(segment_ids[..., None])[..., 0].reshape(-1) == 0
    starts = jnp.where(padding, places, begins[names]).reshape(-1, BLOCK).min(1)
    if window is not None:
        starts = jnp.maximum(starts, places[::BLOCK] - window + 1)
    return starts // BLOCK


def _padded(x, filling=0):
    """[B, T, …] → [B, whole blocks of T, …]."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % BLOCK), *[(0, 0)] * (x.ndim - 2)), constant_values=filling)


def _split(x):
    """[B, T, K, h] → [N, K, C, h]."""
    padded = _padded(x)
    return padded.reshape(-1, BLOCK, *padded.shape[2:]).swapaxes(1, 2)


def _split_queries(x, key):
    """[B, T, H, h] → [N, K, X, h]."""
    blocks = _split(x)
    return blocks.reshape(len(blocks), key.shape[2], -1, blocks.shape[-1])


def _turned(blocks):
    """[N, K, C, h] → [N, K, h, C]."""
    return blocks.swapaxes(2, 3)


def _join(blocks, like):
    """[N, K, C, h] → [B, T, K, h]."""
    B, T = like.shape[:2]
    return blocks.swapaxes(1, 2).reshape(B, -1, *like.shape[2:3], blocks.shape[-1])[:, :T]


def _join_queries(blocks, like):
    """[N, K, X, h] → [B, T, H, h]."""
    return _join(blocks.reshape(len(blocks), like.shape[2], BLOCK, -1), like)
