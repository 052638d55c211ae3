"""The device's part of generation: rows that each make an answer of their own, and take the next prompt when done.

Letters: B slots, S cache columns, n prompts that enter together, P their padded length, R steps in one go.

All rows write to the same cache column, one after the other around a ring of S columns. A row needs no more than its
own last S columns, the one that is written included, so a prompt that enters later is laid behind the ring's current
column and loses nothing: whatever the other rows are doing, a step writes one column, and no shape changes.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from derta_jax.models.attention import KVCache, empty_cache
from derta_jax.models.decoder import Decoder
from derta_jax.models.sharding import constrain

KEYS = ("batch", "kv_heads", None, "sequence")
VALUES = ("batch", "kv_heads", "sequence", None)
"""Logical axes of a layer's cached keys, and of its values."""


class Prompts(NamedTuple):
    """Prompts that enter together. `token_ids` [n, P] are padded on the right, with `lengths` [n].

    `slots` [n] says where each goes; one that is B or more goes nowhere. `limits` [n] are new tokens, at least one;
    `temperatures` [n] are 0 for greedy; `keys` [n] are random keys.
    """

    token_ids: Any
    lengths: Any
    slots: Any
    limits: Any
    temperatures: Any
    keys: Any


class Slots(NamedTuple):
    """`token` [B] is each row's last, still to be read at `position` [B]; `left` [B] more may follow, 0 in a free slot.

    `column` is the ring's next; `temperatures` and `keys` [B] are those of the rows' prompts.
    """

    cache: KVCache
    column: Any
    token: Any
    position: Any
    left: Any
    temperatures: Any
    keys: Any


@functools.partial(jax.jit, static_argnames=("model", "size", "columns"))
def free_slots(model: Decoder, size: int, columns: int) -> Slots:
    """`size` slots around a ring of `columns`, all free. A prompt's length and its limit must fit into the ring."""
    row = jnp.zeros(size, jnp.int32)
    cache = _placed(empty_cache(model.config, size, columns, model.dtype))
    keys = jax.random.split(jax.random.key(0), size)
    return _settled(Slots(cache, jnp.int32(0), row, row, row, jnp.zeros(size), keys))


@functools.partial(jax.jit, static_argnames=("model", "stop_ids"), donate_argnames="slots")
def enter(
    model: Decoder, params: Any, slots: Slots, prompts: Prompts, stop_ids: tuple[int, ...]
) -> tuple[Slots, jax.Array]:
    """Read prompts into their slots; returns the first token of each answer too, [n]."""
    n, P = prompts.token_ids.shape
    places = jnp.arange(P)
    positions = jnp.where(places < prompts.lengths[:, None], places, -1)
    hidden: Any
    read: Any
    hidden, read = model.apply({"params": params}, prompts.token_ids, positions, method="read")
    last = jnp.take_along_axis(hidden, (prompts.lengths - 1)[:, None, None], axis=1)[:, 0]
    first = _pick(model, params, last, prompts.lengths, prompts.temperatures, prompts.keys)

    S = slots.cache.positions.shape[1]
    ring = (slots.column - prompts.lengths[:, None] + places) % S
    row, column = prompts.slots[:, None], jnp.where(positions >= 0, ring, S)  # padding goes nowhere
    cache = slots.cache
    # a slot's earlier row is forgotten by its positions
    known = cache.positions.at[prompts.slots].set(-1, mode="drop").at[row, column].set(read.positions, mode="drop")
    keys = tuple(
        old.at[row, :, :, column].set(new.transpose(0, 3, 1, 2), mode="drop")
        for old, new in zip(cache.keys, read.keys, strict=True)
    )
    values = tuple(
        old.at[row, :, column].set(new.transpose(0, 2, 1, 3), mode="drop")
        for old, new in zip(cache.values, read.values, strict=True)
    )
    entering = {
        "token": first,
        "position": prompts.lengths,
        "left": _left(prompts.limits, first, stop_ids),
        "temperatures": prompts.temperatures,
        "keys": prompts.keys,
    }
    rows = {name: getattr(slots, name).at[prompts.slots].set(new, mode="drop") for name, new in entering.items()}
    return _settled(slots._replace(cache=_placed(KVCache(keys, values, known)), **rows)), _everywhere(first)


@functools.partial(jax.jit, static_argnames=("model", "steps", "stop_ids"), donate_argnames="slots")
def advance(
    model: Decoder, params: Any, slots: Slots, steps: int, stop_ids: tuple[int, ...]
) -> tuple[Slots, jax.Array]:
    """Up to R = `steps` more tokens for each row, int32 [B, R]: its last may be a stop token, -1 is none."""
    S = slots.cache.positions.shape[1]

    def unfinished(state: tuple[jax.Array, Slots, jax.Array]) -> jax.Array:
        step, slots, _ = state
        return (step < steps) & (slots.left > 0).any()

    def one_step(state: tuple[jax.Array, Slots, jax.Array]) -> tuple[jax.Array, Slots, jax.Array]:
        step, slots, made = state
        busy = slots.left > 0
        position = jnp.where(busy, slots.position, -1)
        hidden: Any
        cache: Any
        hidden, cache = model.apply(
            {"params": params}, slots.token, position, slots.cache, slots.column, method="decode"
        )
        following = slots.position + 1
        token = _pick(model, params, hidden, following, slots.temperatures, slots.keys)
        made = jax.lax.dynamic_update_slice_in_dim(made, jnp.where(busy, token, -1)[:, None], step, axis=1)
        slots = slots._replace(
            cache=_placed(cache),
            column=(slots.column + 1) % S,
            token=jnp.where(busy, token, slots.token),
            position=jnp.where(busy, following, slots.position),
            left=jnp.where(busy, _left(slots.left, token, stop_ids), 0),
        )
        return step + 1, slots, made

    nothing = jnp.full((len(slots.token), steps), -1, jnp.int32)
    _, slots, made = jax.lax.while_loop(unfinished, one_step, (jnp.int32(0), slots, nothing))
    return _settled(slots), _everywhere(made)


@jax.jit
def keep(slots: Slots, kept: jax.Array) -> Slots:
    """Those slots alone, int32 [n], in this order."""
    rows = jax.tree.map(lambda array: array[kept], slots._replace(column=()))
    return _settled(rows._replace(column=slots.column))


def _pick(
    model: Decoder, params: Any, hidden: jax.Array, position: jax.Array, temperatures: jax.Array, keys: jax.Array
) -> jax.Array:
    """The tokens [n] that stand at `position` [n], from the states before; what is drawn depends on the row alone."""
    logits: Any = model.apply({"params": params}, hidden, method="logits")

    def noisy(logits: jax.Array) -> jax.Array:
        draw = jax.vmap(lambda key, position: jax.random.gumbel(jax.random.fold_in(key, position), logits.shape[1:]))
        return logits + temperatures[:, None] * draw(keys, position)

    logits = jax.lax.cond((temperatures > 0).any(), noisy, lambda logits: logits, logits)
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def _left(limits: jax.Array, token: jax.Array, stop_ids: tuple[int, ...]) -> jax.Array:
    """How many tokens may follow `token`, of `limits` that it is the first of."""
    return jnp.where(jnp.isin(token, jnp.array(stop_ids)), 0, limits - 1)


def _placed(cache: KVCache) -> KVCache:
    keys = tuple(constrain(array, *KEYS) for array in cache.keys)
    values = tuple(constrain(array, *VALUES) for array in cache.values)
    return KVCache(keys, values, constrain(cache.positions, "batch", "sequence"))


def _settled(slots: Slots) -> Slots:
    """Placed as every program finds and leaves them, so that none is compiled for two placements of one shape."""
    cache, *rows = slots
    return Slots(_placed(cache), *map(_everywhere, rows))


def _everywhere(tokens: jax.Array) -> jax.Array:
    return constrain(tokens, *[None] * tokens.ndim)
