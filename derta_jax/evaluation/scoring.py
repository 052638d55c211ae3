"""How probable a continuation is after its context, and whether greedy decoding would have written it.

Letters: B rows, T their padded length, K scored tokens before the last one, A last tokens, C tokens of a row at a time.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from derta_jax.evaluation.generate import bucket, pad_right
from derta_jax.models.decoder import Decoder
from derta_jax.models.sharding import mesh_axis_size

LOGITS_AT_A_TIME = 512
"""Tokens, over all rows of a device, that have their logits in memory together."""


@dataclass(frozen=True)
class Score:
    """`log_probability` of all tokens of a continuation together, natural, float32 added up in float64."""

    log_probability: float
    greedy: bool


@dataclass(frozen=True)
class _Row:
    """What a model reads once: pairs that differ in their very last token alone share it.

    `token_ids` are context and continuation but for that token, of which the last `scored` are the continuation's;
    `endings` are places in the list of pairs, with their last tokens.
    """

    token_ids: tuple[int, ...]
    scored: int
    endings: list[tuple[int, int]]


def scores(
    model: Decoder,
    params: Any,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    batch_size: int = 32,
    progress: Callable[[int], None] = lambda count: None,
) -> list[Score]:
    """A score for each (context, continuation), token ids, at least one each; in order.

    To be used under the mesh that `params` lie on. `progress` is told how many are done. Choices of one token, as in
    MMLU, are read once for all choices.
    """
    results: list[Score | None] = [None] * len(pairs)
    done = 0
    # pairs of one padded length go together, so few shapes are compiled
    for _, group in itertools.groupby(_rows(pairs), key=lambda row: bucket(len(row.token_ids))):
        rows = list(group)
        width = _width(len(rows), batch_size)
        for start in range(0, len(rows), width):
            batch = rows[start : start + width]
            for place, score in _scores_of(model, params, batch, width):
                results[place] = score
            done += sum(len(row.endings) for row in batch)
            progress(done)
    return [score for score in results if score is not None]


def _rows(pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[_Row]:
    """In the order of their padded lengths, and within one of the tokens that are scored."""
    rows: dict[tuple[tuple[int, ...], int], _Row] = {}
    for place, (context, continuation) in enumerate(pairs):
        *body, last = continuation
        key = (*context, *body), len(body)
        rows.setdefault(key, _Row(*key, [])).endings.append((place, last))
    return sorted(rows.values(), key=lambda row: (bucket(len(row.token_ids)), row.scored, len(row.endings)))


def _width(rows: int, batch_size: int) -> int:
    """Rows of a batch: a power of two where they are fewer than `batch_size`, and a multiple of the mesh's."""
    multiple = mesh_axis_size("batch")
    return -(-min(batch_size, _power_of_two(rows)) // multiple) * multiple


def _power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length()


def _scores_of(model: Decoder, params: Any, batch: Sequence[_Row], width: int) -> list[tuple[int, Score]]:
    padded = [*batch, *[batch[-1]] * (width - len(batch))]
    token_ids, lengths = pad_right([row.token_ids for row in padded])
    longest = max(row.scored for row in batch)
    columns = bucket(longest) if longest else 0
    endings = np.zeros((width, _power_of_two(max(len(row.endings) for row in batch))), np.int32)
    targets = np.zeros((width, columns), np.int32)
    for n, row in enumerate(padded):
        endings[n, : len(row.endings)] = [token for _, token in row.endings]
        targets[n, columns - row.scored :] = row.token_ids[len(row.token_ids) - row.scored :]
    made = _score_rows(model, params, token_ids, lengths, targets, endings)
    before, agrees, last, best = (np.asarray(array) for array in made)
    results = []
    for n, row in enumerate(batch):
        own = slice(columns - row.scored, columns)
        total, greedy = before[n, own].sum(dtype=np.float64), bool(agrees[n, own].all())
        for a, (place, token) in enumerate(row.endings):
            results.append((place, Score(float(total + last[n, a]), greedy and int(best[n]) == token)))
    return results


@functools.partial(jax.jit, static_argnames=("model",))
def _score_rows(
    model: Decoder, params: Any, token_ids: jax.Array, lengths: jax.Array, targets: jax.Array, endings: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Of rows [B, T] that end in `targets` [B, K] and may go on with any of `endings` [B, A].

    Returns the log-probabilities of targets [B, K] and whether they are the most probable [B, K], the log-probabilities
    of endings [B, A], and the most probable one [B].
    """
    B, K = targets.shape
    segments = (jnp.arange(token_ids.shape[1]) < lengths[:, None]).astype(jnp.int32)
    hidden: Any = model.apply({"params": params}, token_ids, segments, method="hidden_states")
    # the states that the targets and the ending follow; columns without a target may point anywhere
    places = jnp.maximum(lengths[:, None] - 1 - K + jnp.arange(K + 1), 0)
    states = jnp.take_along_axis(hidden, places[:, :, None], axis=1)

    def log_probabilities(states: jax.Array, wanted: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Of the tokens `wanted` [B, n] after `states` [B, n, D] or [B, 1, D], and the most probable ones."""
        logits: Any = model.apply({"params": params}, states, method="logits")
        # a sum over the vocabulary, because that stays where its parts are
        own = jnp.where(jnp.arange(logits.shape[-1]) == wanted[:, :, None], logits, 0).sum(axis=-1)
        return own - jax.nn.logsumexp(logits, axis=-1), jnp.argmax(logits, axis=-1)

    last, best = log_probabilities(states[:, K:], endings)
    if not K:
        nothing = jnp.zeros((B, 0))
        return nothing, nothing.astype(bool), last, best[:, 0]
    C = _chunk(K, B // mesh_axis_size("batch"))
    chunks = states[:, :K].reshape(B, K // C, C, -1).swapaxes(0, 1), targets.reshape(B, K // C, C).swapaxes(0, 1)
    before, likeliest = jax.lax.map(lambda chunk: log_probabilities(*chunk), chunks)
    before, likeliest = (array.swapaxes(0, 1).reshape(B, K) for array in (before, likeliest))
    return before, likeliest == targets, last, best[:, 0]


def _chunk(K: int, rows: int) -> int:
    """The largest power of two that keeps so many rows within `LOGITS_AT_A_TIME`; it divides K, which is one, too."""
    return min(K, max(1, 1 << (LOGITS_AT_A_TIME // rows).bit_length() - 1)) if rows <= LOGITS_AT_A_TIME else 1
