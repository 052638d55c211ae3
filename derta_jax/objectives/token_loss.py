"""Cross-entropy over labelled positions only, vocabulary-parallel and in chunks: full logits never exist.

The small hidden states travel, a chunk at a time, and the head stays where it is: each device holds its slice of the
vocabulary and computes it for every labelled token of its data group. Where the vocabulary does not split over these
devices, each computes all of it for its own tokens.

Where gradients are wanted, they are made while a chunk's logits are there: the backward pass only scales them.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from derta_jax.models.sharding import constrain, gathered, mesh_axis_size

Measure = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""(logits float32 [G, C, V], labels [G, C], weights [G, C, W]) → sums [W] over all of these tokens."""


class _Tokens(NamedTuple):
    """hidden [devices, M, D] predict labels int32 [devices, M], which count by weights float32 [devices, M, W]."""

    hidden: jax.Array
    labels: jax.Array
    weights: jax.Array


def labelled_cross_entropy(
    hidden: jax.Array,
    head: jax.Array,
    labels: jax.Array,
    weights: jax.Array,
    coefficients: jax.Array,
    capacity: int | None = None,
    chunk: int = 2048,
) -> tuple[jax.Array, jax.Array]:
    """(loss, sums): weighted sums of -log P(label), float32 [W], and their sum by coefficients [W], the loss.

    The loss alone has gradients: by hidden, in its dtype, and by head, added up in float32. Other arguments are those
    of `labelled_sums`.
    """
    tokens = _by_device(hidden, labels, weights, capacity)
    loss, sums = _cross_entropy(tokens, head, coefficients, chunk)
    return loss, jax.lax.stop_gradient(sums)


def labelled_sums(
    measure: Measure,
    hidden: jax.Array,
    head: jax.Array,
    labels: jax.Array,
    weights: jax.Array,
    capacity: int | None = None,
    chunk: int = 2048,
) -> jax.Array:
    """`measure` summed over all labelled positions, float32 [W]. Not for gradients: these would keep all logits.

    hidden [S, T, D] at t predicts labels int32 [S, T] at t; weights float32 [S, T, W] holds W weightings, all zero
    where a position has no label. head is [D, V]. `capacity` bounds the labelled positions of one device (all positions
    where None); `chunk` bounds those of one device whose logits exist at a time.
    """
    return _sums(measure, _by_device(hidden, labels, weights, capacity), head, chunk)


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


def _sums(measure: Measure, tokens: _Tokens, head: jax.Array, chunk: int) -> jax.Array:
    layout = _layout(head)
    head = constrain(head.astype(tokens.hidden.dtype), None, layout.vocabulary)

    def add_chunk(total: jax.Array, piece: _Tokens) -> tuple[jax.Array, None]:
        hidden, labels, weights = map(layout.together, piece)
        return total + measure(_logits(hidden, head), labels, weights), None

    return jax.lax.scan(add_chunk, jnp.zeros(tokens.weights.shape[-1]), _chunks(tokens, layout, chunk))[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _cross_entropy(
    tokens: _Tokens, head: jax.Array, coefficients: jax.Array, chunk: int
) -> tuple[jax.Array, jax.Array]:
    """(loss, sums)."""
    sums = _sums(_cross_entropy_sums, tokens, head, chunk)
    return sums @ coefficients, sums


def _forward(tokens: _Tokens, head: jax.Array, coefficients: jax.Array, chunk: int) -> tuple[Any, Any]:
    """(loss, sums), and the loss's gradients by hidden and by head."""
    layout = _layout(head)
    narrow = constrain(head.astype(tokens.hidden.dtype), None, layout.vocabulary)

    def add_chunk(totals: tuple[jax.Array, jax.Array], piece: _Tokens) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        hidden, labels, weights = map(layout.together, piece)

        def loss(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
            sums = _cross_entropy_sums(logits, labels, weights)
            return sums @ coefficients, sums

        by_logits, sums = jax.grad(loss, has_aux=True)(_logits(hidden, narrow))
        # XLA:TPU would compute this anew for each tile of the products that read it
        by_logits = jax.lax.optimization_barrier(by_logits.astype(narrow.dtype))
        by_head = jnp.einsum("GCD,GCV->GDV", hidden, by_logits, preferred_element_type=jnp.float32)
        by_head = constrain(totals[1] + by_head, layout.groups, None, layout.vocabulary)
        # the parts that devices have of it, each from its slice of the vocabulary, meet in this dtype
        by_hidden = layout.apart(jnp.einsum("GCV,DV->GCD", by_logits, narrow))
        return (totals[0] + sums, by_head), by_hidden

    pieces = _chunks(tokens, layout, chunk)
    by_head = jnp.zeros((pieces.hidden.shape[1], *head.shape))
    zeros = jnp.zeros(tokens.weights.shape[-1]), constrain(by_head, layout.groups, None, layout.vocabulary)
    (sums, by_head), by_hidden = jax.lax.scan(add_chunk, zeros, pieces)
    return (sums @ coefficients, sums), (_joined(by_hidden, tokens.hidden), by_head.sum(0).astype(head.dtype))


def _backward(chunk: int, gradients: tuple[jax.Array, jax.Array], cotangents: tuple[jax.Array, jax.Array]) -> Any:
    by_hidden, by_head = ((cotangents[0] * gradient).astype(gradient.dtype) for gradient in gradients)
    none: Any = None
    return _Tokens(by_hidden, none, none), by_head, none


_cross_entropy.defvjp(_forward, _backward)


class _Layout(NamedTuple):
    """The logical axes of groups of tokens, of a group's tokens while each is with its device, and of the vocabulary.

    A group's devices share its tokens and split the vocabulary, or it is one device.
    """

    groups: str
    tokens: str | None
    vocabulary: str | None

    def together(self, array: jax.Array) -> jax.Array:
        """[groups, tokens, …], a group's tokens on all of its devices."""
        return gathered(array, self.groups, self.tokens, *[None] * (array.ndim - 2))

    def apart(self, array: jax.Array) -> jax.Array:
        """[groups, tokens, …], each token with its device."""
        return constrain(array, self.groups, self.tokens, *[None] * (array.ndim - 2))


def _layout(head: jax.Array) -> _Layout:
    if head.shape[1] % mesh_axis_size("loss_vocab") == 0:
        return _Layout("loss_group", "loss_tokens", "loss_vocab")
    return _Layout("batch", None, "vocab" if head.shape[1] % mesh_axis_size("vocab") == 0 else None)


def _logits(hidden: jax.Array, head: jax.Array) -> jax.Array:
    return jnp.einsum("GCD,DV->GCV", hidden, head, preferred_element_type=jnp.float32)


def _by_device(hidden: jax.Array, labels: jax.Array, weights: jax.Array, capacity: int | None) -> _Tokens:
    """The labelled positions of each device, at most `capacity`; weights are zero where there are fewer."""
    hidden, labels, weights = (
        constrain(array.reshape(mesh_axis_size("batch"), -1, *array.shape[2:]), "batch", *[None] * (array.ndim - 1))
        for array in (hidden, labels, weights)
    )
    if capacity is None or capacity >= labels.shape[1]:
        return _Tokens(hidden, labels, weights)
    select = jax.vmap(lambda mask: jnp.nonzero(mask, size=capacity, fill_value=-1)[0])
    index = select((weights != 0).any(-1))
    hidden, labels, weights = (
        jnp.take_along_axis(array, jnp.expand_dims(index, tuple(range(2, array.ndim))), axis=1)
        for array in (hidden, labels, weights)
    )
    return _Tokens(hidden, labels, weights * (index >= 0)[..., None])


def _chunks(tokens: _Tokens, layout: _Layout, chunk: int) -> _Tokens:
    """Each array [devices, M, …] → [chunks, groups, tokens, …], zero-padded, at most `chunk` tokens of each device."""
    devices, length = tokens.labels.shape
    chunks = -(-length // chunk)

    def split(array: jax.Array) -> jax.Array:
        rest = array.shape[2:]
        padded = jnp.pad(array, [(0, 0), (0, -length % chunks)] + [(0, 0)] * len(rest))
        pieces = jnp.moveaxis(padded.reshape(devices, chunks, -1, *rest), 1, 0)
        grouped = pieces.reshape(chunks, mesh_axis_size(layout.groups), -1, *rest)
        return constrain(grouped, None, layout.groups, layout.tokens, *[None] * len(rest))

    return _Tokens(*map(split, tokens))


def _joined(chunks: jax.Array, like: jax.Array) -> jax.Array:
    """[chunks, groups, tokens, D] → [devices, M, D], as `like` is, without the padding."""
    devices, length, width = like.shape
    by_device = jnp.moveaxis(chunks.reshape(len(chunks), devices, -1, width), 0, 1)
    return by_device.reshape(devices, -1, width)[:, :length]
