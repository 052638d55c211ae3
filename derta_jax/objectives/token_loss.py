"""Cross-entropy over labelled positions only, vocabulary-parallel and in chunks: full logits never exist.

The small hidden states travel, a chunk at a time, and the head stays where it is: each device holds its slice of the
vocabulary and computes it for every labelled token of its data group. Where the vocabulary does not split over these
devices, each computes all of it for its own tokens.
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

    hidden [S, T, D] at t predicts labels int32 [S, T] at t; weights float32 [S, T, W] holds W weightings, all zero
    where a position has no label. head is [D, V]. `capacity` bounds the labelled positions of one device (all positions
    where None); `chunk` bounds those of one device whose logits exist at a time.
    """
    devices, groups = mesh_axis_size("batch"), mesh_axis_size("loss_group")
    hidden, labels, weights = (
        constrain(array.reshape(devices, -1, *array.shape[2:]), "batch", *[None] * (array.ndim - 1))
        for array in (hidden, labels, weights)
    )
    if capacity is not None and capacity < labels.shape[1]:
        hidden, labels, weights = _labelled(hidden, labels, weights, capacity)
    split_vocabulary = head.shape[1] % mesh_axis_size("loss_vocab") == 0
    vocabulary = "loss_vocab" if split_vocabulary else "vocab" if head.shape[1] % mesh_axis_size("vocab") == 0 else None
    head = constrain(head.astype(hidden.dtype), None, vocabulary)

    def meet(array: jax.Array) -> jax.Array:
        """A chunk [devices, C, …]; where the vocabulary is split, [G, tokens, …] on all devices of a data group."""
        if not split_vocabulary:
            return array
        rest = [None] * (array.ndim - 1)
        return constrain(constrain(array, "batch", *rest).reshape(groups, -1, *array.shape[2:]), "loss_group", *rest)

    @jax.checkpoint
    def chunk_sums(total, piece):
        hidden, labels, weights = map(meet, piece)
        logits = jnp.einsum("GCD,DV->GCV", hidden, head, preferred_element_type=jnp.float32)
        return total + measure(logits, labels, weights), None

    chunks = -(-labels.shape[1] // chunk)
    padding = -labels.shape[1] % chunks
    pieces = tuple(_split(array, chunks, padding) for array in (hidden, labels, weights))
    return jax.lax.scan(chunk_sums, jnp.zeros(weights.shape[-1], jnp.float32), pieces)[0]


def next_tokens(array: jax.Array) -> jax.Array:
    """[S, T, …] shifted by one place to the left, zero at the end: hidden state t predicts token t + 1."""
    return jnp.concatenate([array[:, 1:], jnp.zeros_like(array[:, :1])], axis=1)


def negative_log_likelihood(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """-log P(label) [...] from logits [..., V]; one label for each position, or one for all."""
    # a masked sum, not a gather: it stays local to each slice of the vocabulary
    at_label = jnp.arange(logits.shape[-1]) == labels[..., None]
    label_logit = jnp.sum(jnp.where(at_label, logits, 0.0), axis=-1)
    return jax.nn.logsumexp(logits, axis=-1) - label_logit


def _cross_entropy_sums(logits: jax.Array, labels: jax.Array, weights: jax.Array) -> jax.Array:
    return jnp.einsum("GC,GCW->W", negative_log_likelihood(logits, labels), weights)


def _labelled(
    hidden: jax.Array, labels: jax.Array, weights: jax.Array, capacity: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The labelled positions of each device, at most `capacity`; weights are zero where there are fewer."""
    select = jax.vmap(lambda mask: jnp.nonzero(mask, size=capacity, fill_value=-1)[0])
    index = select((weights != 0).any(-1))
    hidden, labels, weights = (
        jnp.take_along_axis(array, jnp.expand_dims(index, tuple(range(2, array.ndim))), axis=1)
        for array in (hidden, labels, weights)
    )
    return hidden, labels, weights * (index >= 0)[..., None]


def _split(array: jax.Array, chunks: int, padding: int) -> jax.Array:
    """[devices, M, …] → [chunks, devices, M / chunks, …], zero-padded."""
    padded = jnp.pad(array, [(0, 0), (0, padding)] + [(0, 0)] * (array.ndim - 2))
    return jnp.moveaxis(padded.reshape(array.shape[0], chunks, -1, *array.shape[2:]), 1, 0)
