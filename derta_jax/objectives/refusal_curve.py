"""How ready a model is to refuse at each point of an answer: mean P(refusal token | all before it) by position.

Place j of an answer counts from 0, its eos is the last; at place j the refusal token stands in place of the answer's
own token. Harmful answers are the RTO rows': a model trained by DeRTa refuses at every place of them. Helpful answers
are those of other rows that have nothing harmful before them: there it should refuse at none.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from derta_jax.config import Objective
from derta_jax.data.tokenise import Region
from derta_jax.models.decoder import Decoder, head_matrix
from derta_jax.objectives.token_loss import labelled_sums, negative_log_likelihood, next_tokens

BUCKET_ENDS = (0, *(2**power for power in range(21)))
"""The last place of each bucket: 0, 1, 2, 3–4, 5–8, 9–16, …; what lies behind the last one counts there."""

KINDS = ("harmful", "helpful")

Sums = Callable[[Any, dict[str, jax.Array]], dict[str, jax.Array]]


def loss_and_refusal_sums(
    model: Decoder, objective: Objective, refusal_id: int, label_capacity: int | None = None
) -> Sums:
    """(variables, micro-batch) → sums of DeRTa's loss and of refusal probabilities, from one forward pass.

    `mle_sum`, `mle_tokens`, `rto_sum` and `rto_tokens` are those of `derta_loss`. `refusal_sum` and `refusal_tokens`
    [2, K] hold P(refusal token) and how many places it was taken at, by `KINDS` and by the K buckets that the
    micro-batch's sequences can fill. Places whose label does not count (`keep`) are left out of all.
    """

    def measure(logits: jax.Array, labels: jax.Array, weights: jax.Array) -> jax.Array:
        loss = negative_log_likelihood(logits, labels)
        refusal = jnp.exp(-negative_log_likelihood(logits, jnp.int32(refusal_id)))
        of_loss, of_refusal = weights[..., :2], weights[..., 2:]
        return jnp.concatenate([jnp.einsum("GC,GCW->W", loss, of_loss), jnp.einsum("GC,GCW->W", refusal, of_refusal)])

    def sums(variables: Any, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        inputs = (batch[name] for name in ("token_ids", "segment_ids", "positions"))
        hidden: Any = model.apply(variables, *inputs, method="hidden_states")
        rto, keep = batch["rto"], batch["keep"]
        kinds = jnp.stack([keep & ~rto, keep & rto], -1).astype(jnp.float32)
        places = place_weights(batch)
        totals = labelled_sums(
            measure,
            hidden,
            head_matrix(variables["params"]),
            next_tokens(jnp.where(rto, refusal_id, batch["token_ids"])),
            next_tokens(jnp.concatenate([kinds, places.reshape(*keep.shape, -1)], -1)),
            label_capacity,
            objective.loss_chunk,
        )
        counts = kinds.sum((0, 1))
        return {
            "mle_sum": totals[0],
            "mle_tokens": counts[0],
            "rto_sum": totals[1],
            "rto_tokens": counts[1],
            "refusal_sum": totals[2:].reshape(places.shape[2:]),
            "refusal_tokens": places.sum((0, 1)),
        }

    return sums


def place_weights(batch: dict[str, jax.Array]) -> jax.Array:
    """Float32 [S, T, 2, K]: 1 at the kind and the bucket of each kept answer token, all 0 for other tokens."""
    regions, segments = batch["regions"], batch["segment_ids"]
    answer = regions >= Region.RESPONSE
    ends = jnp.array(BUCKET_ENDS[: bucket_count(regions.shape[1])])
    bucket = jnp.searchsorted(ends, _count_in_segment(answer, segments) - 1)
    after_harm = _count_in_segment(regions == Region.HARMFUL_PREFIX, segments) > 0
    kinds = jnp.stack([batch["rto"], ~batch["rto"] & ~after_harm], -1) & (answer & batch["keep"])[..., None]
    in_bucket = jnp.minimum(bucket, len(ends) - 1)[..., None] == jnp.arange(len(ends))
    return (kinds[..., :, None] & in_bucket[..., None, :]).astype(jnp.float32)


def bucket_count(length: int) -> int:
    """How many buckets answers of at most `length` tokens reach into."""
    return sum(end < length - 1 for end in BUCKET_ENDS[:-1]) + 1


def mean_by_bucket(sums: Sequence[float], counts: Sequence[float]) -> list[dict[str, float]]:
    """One kind's curve: mean `p` over `n` places `from` … `to`, both included; buckets without any are left out."""
    starts = (0, *(end + 1 for end in BUCKET_ENDS))
    return [
        {"from": start, "to": end, "p": float(total) / float(count), "n": int(count)}
        for start, end, total, count in zip(starts, BUCKET_ENDS, sums, counts, strict=False)
        if count
    ]


def _count_in_segment(mask: jax.Array, segments: jax.Array) -> jax.Array:
    """How often `mask` [S, T] holds from the start of each token's segment up to the token, itself included."""
    count = jnp.cumsum(mask, axis=1)
    starts = jnp.diff(segments, axis=1, prepend=-1) != 0
    before = jax.lax.cummax(jnp.where(starts, count - mask, 0), axis=1)
    return count - before
