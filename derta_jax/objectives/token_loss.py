"""Cross-entropy over labelled positions only, vocabulary-parallel and in chunks: full logits never exist.

The small hidden states travel, the head stays where it is: each device holds its slice of the vocabulary and computes
it for every labelled token of its data group.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from derta_jax.models.sharding import constrain, mesh_axis_size

Measure = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""(logits float32 [G, C, V], labels [G, C], weights [G, C, W]) → sums [W] over all of these tokens."""


def labelled_cross_entropy(
    hidden: jax.Array,
    head: jax.Array,
    labels: jax.Array,
    weights: jax.Array,
    capacity: int | None = None,
    chunk: int = 2048,
) -> jax.Array:
    """Weighted sums of -log P(label), float32 [W]; the arguments are those of `labelled_sums`."""
    return labelled_sums(_cross_entropy_sums, hidden, head, labels, weights, capacity, chunk)


def labelled_sums(
    measure: Measure,
    hidden: jax.Array,
    head: jax.Array,
    labels: jax.Array,
    weights: jax.Array,
    capacity: int | None = None,
    chunk: int = 2048,
) -> jax.Array:
    """`measure` summed over all labelled positions, float32 [W].

    hidden [S, T, D] predicts labels int32 [S, T]; weights float32 [S, T, W] holds W weightings, all zero where a
    position has no label. head is [D, V]. `capacity` bounds the labelled positions of one data group (all positions
    where None); `chunk` bounds the tokens whose logits exist at a time.
    """
    groups = mesh_axis_size("loss_group")
    hidden = hidden.reshape(groups, -1, hidden.shape[-1])
    labels = labels.reshape(groups, -1)
    weights = weights.reshape(groups, -1, weights.shape[-1])
    if capacity is not None and capacity < labels.shape[1]:
        select = jax.vmap(lambda mask: jnp.nonzero(mask, size=capacity, fill_value=-1)[0])
        index = select((weights != 0).any(-1))
        hidden, labels, weights = (
            jnp.take_along_axis(array, jnp.expand_dims(index, tuple(range(2, array.ndim))), axis=1)
            for array in (hidden, labels, weights)
        )
        weights = weights * (index >= 0)[..., None]
    hidden = constrain(hidden, "loss_group", None, None)
    head = constrain(head.astype(hidden.dtype), None, _vocabulary_axis(head.shape[1]))

    chunks = -(-labels.shape[1] // chunk)
    padding = -labels.shape[1] % chunks
    pieces = tuple(_split(array, chunks, padding) for array in (hidden, labels, weights))

    @jax.checkpoint
    def chunk_sums(total, piece):
        hidden, labels, weights = piece
        logits = jnp.einsum("GCD,DV->GCV", hidden, head, preferred_element_type=jnp.float32)
        return total + measure(logits, labels, weights), None

    return jax.lax.scan(chunk_sums, jnp.zeros(weights.shape[-1], jnp.float32), pieces)[0]


def negative_log_likelihood(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """-log P(label) [...] from logits [..., V]; one label for each position, or one for all."""
    # a masked sum, not a gather: it stays local to each slice of the vocabulary
    at_label = jnp.arange(logits.shape[-1]) == labels[..., None]
    label_logit = jnp.sum(jnp.where(at_label, logits, 0.0), axis=-1)
    return jax.nn.logsumexp(logits, axis=-1) - label_logit


def _cross_entropy_sums(logits: jax.Array, labels: jax.Array, weights: jax.Array) -> jax.Array:
    return jnp.einsum("GC,GCW->W", negative_log_likelihood(logits, labels), weights)


def _split(array: jax.Array, chunks: int, padding: int) -> jax.Array:
    """[G, M, …] → [chunks, G, M / chunks, …], zero-padded."""
    padded = jnp.pad(array, [(0, 0), (0, padding)] + [(0, 0)] * (array.ndim - 2))
    return jnp.moveaxis(padded.reshape(array.shape[0], chunks, -1, *array.shape[2:]), 1, 0)


def _vocabulary_axis(vocab_size: int) -> str | None:
    """Over all devices of a data group where the vocabulary splits evenly, else over tensor alone, else nowhere."""
    for axis in ("loss_vocab", "vocab"):
        if vocab_size % mesh_axis_size(axis) == 0:
            return axis
    return None
