"""KV-cached generation: prompts of mixed length in padded batches of static shape, greedy or sampled."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from derta_jax.models.attention import empty_cache
from derta_jax.models.decoder import Decoder

SMALLEST_BUCKET = 16


@dataclasses.dataclass(frozen=True)
class Answer:
    """`token_ids` without the stop token; `finish_reason` is `stop` or `length`."""

    token_ids: list[int]
    finish_reason: str


def generate(
    model: Decoder,
    params: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    stop_ids: Sequence[int],
    batch_size: int = 32,
    temperature: float = 0.0,
    seed: int = 0,
    progress: Callable[[int], None] = lambda count: None,
) -> list[Answer]:
    """One answer for each prompt (token ids, at least one), in order. `progress` is told how many are done.

    Prompts of similar length share a batch, padded on the right to a power of two, so few shapes are compiled.
    Temperature 0 is greedy; sampling is keyed by (seed, place of the prompt), not by the batch it falls in.
    """
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    answers: dict[int, Answer] = {}
    key = jax.random.key(seed)
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        padded = indices + [indices[-1]] * (batch_size - len(indices))
        tokens, lengths = pad_right([prompts[index] for index in padded])
        keys = jax.vmap(lambda index: jax.random.fold_in(key, index))(jnp.array(padded))
        generated = _decode(
            model, params, tokens, lengths, keys, jnp.float32(temperature), max_new_tokens, tuple(stop_ids)
        )
        for index, row in zip(indices, np.asarray(generated), strict=False):
            answers[index] = _cut(row.tolist(), stop_ids)
        progress(len(answers))
    return [answers[index] for index in range(len(prompts))]


def pad_right(prompts: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Token ids [B, P], padded on the right, and lengths [B]; P is a power of two."""
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    bucket = SMALLEST_BUCKET
    while bucket < lengths.max():
        bucket *= 2
    tokens = np.zeros((len(prompts), bucket), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    return tokens, lengths


def _cut(token_ids: list[int], stop_ids: Sequence[int]) -> Answer:
    stop = next((place for place, token in enumerate(token_ids) if token in stop_ids), None)
    return Answer(token_ids, "length") if stop is None else Answer(token_ids[:stop], "stop")


@functools.partial(jax.jit, static_argnames=("model", "max_new_tokens", "stop_ids"))
def _decode(
    model: Decoder,
    params: Any,
    tokens: jax.Array,
    lengths: jax.Array,
    keys: jax.Array,
    temperature: jax.Array,
    max_new_tokens: int,
    stop_ids: tuple[int, ...],
) -> jax.Array:
    """Token ids [B, max_new_tokens]; what follows a stop token is that token again.

    Generated tokens share cache columns behind the padded prompts, so that each step writes one column; positions are
    each row's own.
    """
    batch, width = tokens.shape
    columns = jnp.arange(width)
    positions = jnp.where(columns < lengths[:, None], columns, -1)
    cache: Any = empty_cache(model.config, batch, width + max_new_tokens, model.dtype)
    hidden, cache = model.apply({"params": params}, tokens, positions, cache, 0, method="decode")
    stops = jnp.array(stop_ids)

    def pick(hidden: jax.Array, step: jax.Array) -> jax.Array:
        logits: Any = model.apply({"params": params}, hidden, method="logits")
        noise = jax.vmap(lambda key: jax.random.gumbel(jax.random.fold_in(key, step), logits.shape[1:]))(keys)
        return jnp.argmax(logits + temperature * noise, axis=-1).astype(jnp.int32)

    def unfinished(state: dict[str, Any]) -> jax.Array:
        return (state["step"] < max_new_tokens) & ~state["done"].all()

    def advance(state: dict[str, Any]) -> dict[str, Any]:
        step, token = state["step"], state["token"]
        generated = jax.lax.dynamic_update_slice_in_dim(state["generated"], token[:, None], step, axis=1)
        done = state["done"] | jnp.isin(token, stops)
        hidden, cache = model.apply(
            {"params": params},
            token[:, None],
            (lengths + step)[:, None],
            state["cache"],
            width + step,
            method="decode",
        )
        following = jnp.where(done, token, pick(hidden[:, 0], step + 1))
        return {"step": step + 1, "token": following, "done": done, "generated": generated, "cache": cache}

    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
    start = {
        "step": jnp.int32(0),
        "token": pick(last, jnp.int32(0)),
        "done": jnp.zeros(batch, bool),
        "generated": jnp.full((batch, max_new_tokens), stop_ids[0], jnp.int32),
        "cache": cache,
    }
    return jax.lax.while_loop(unfinished, advance, start)["generated"]
