"""How ready a model is to refuse at each point of an answer: mean P(refusal token | all before it) by position.

Place j of an answer counts from 0, its eos is the last; at place j the refusal token stands in place of the answer's
own token. Harmful answers are the RTO rows': a model trained by DeRTa refuses at every place of them. Helpful answers
are those of other rows that have nothing harmful before them: there it should refuse at none.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from derta_jax.data.tokenise import Region
from derta_jax.models.decoder import head_matrix
from derta_jax.objectives.objective import Mean
from derta_jax.objectives.token_loss import cross_entropy, labelled_sums, next_tokens
from derta_jax.objectives.view import Batch, View, count_before

BUCKET_ENDS = (0, *(2**power for power in range(21)))
"""The last place of each bucket: 0, 1, 2, 3–4, 5–8, 9–16, …; what lies behind the last one counts there."""

KINDS = ("harmful", "helpful")


def refusal_sums(model: View, batch: Batch, refusing: jax.Array) -> Mean:
    """P(refusal token) summed over the places of answers, and how many these are, [2, K] each.

    By `KINDS` and by the K buckets that the micro-batch's sequences can fill; harmful are tokens of rows that are
    `refusing`, bool [S, T]. Places whose label does not count (`keep`) are left out.
    """
    places = place_weights(batch, refusing)
    sums = labelled_sums(
        lambda *measured: jnp.exp(-cross_entropy(*measured)),
        model.forward(batch).hidden,
        head_matrix(model.variables["params"]),
        jnp.full_like(batch["token_ids"], model.refusal_id),
        next_tokens(places.reshape(*refusing.shape, -1)),
        model.label_capacity,
        model.loss_chunk,
    )
    return Mean(sums.reshape(places.shape[2:]), places.sum((0, 1)))


def place_weights(batch: Batch, refusing: jax.Array) -> jax.Array:
    """Float32 [S, T, 2, K]: 1 at the kind and the bucket of each kept answer token, all 0 for other tokens."""
    regions, segments = batch["regions"], batch["segment_ids"]
    answer = regions >= Region.RESPONSE
    ends = jnp.array(BUCKET_ENDS[: bucket_count(regions.shape[1])])
    bucket = jnp.searchsorted(ends, count_before(answer, segments))
    after_harm = count_before(regions == Region.HARMFUL_PREFIX, segments) > 0
    kinds = jnp.stack([refusing, ~refusing & ~after_harm], -1) & (answer & batch["keep"])[..., None]
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
