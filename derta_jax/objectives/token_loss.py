"""Cross-entropy over labelled positions only, vocabulary-parallel and in chunks: full logits never exist.

The small hidden states travel, a chunk at a time, and the head stays where it is: each device holds its slice of the
vocabulary and computes it for every labelled token of its data group. Where the vocabulary does not split over these
devices, each computes all of it for its own tokens.

Where gradients are wanted, they are made while a chunk's logits are there: the backward pass only scales them. On a CPU
these logits lie with the vocabulary before the tokens: Eigen's products of few tokens by many words are faster so.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from derta_jax.models.sharding import constrain, gathered, mesh_axis_size

Measure = Callable[[jax.Array, Any, jax.Array, int], jax.Array]
"""(logits float32, what is told of each token [G, C, …], head [D, V], axis) → float32 [G, C].

Logits are [G, C, V] or [G, V, C]: `axis`, 2 or 1, is the vocabulary's. What is told may be any tree of arrays: labels,
or the hidden states of a reference.
"""


class _Tokens(NamedTuple):
    """hidden [devices, M, D], what is told of each, and the weights float32 [devices, M, W] that it counts by."""

    hidden: jax.Array
    told: Any
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
    """`labelled_loss` of -log P(label); labels int32 [S, T]."""
    return labelled_loss(cross_entropy, hidden, head, labels, weights, coefficients, capacity, chunk)


def labelled_loss(
    measure: Measure,
    hidden: jax.Array,
    head: jax.Array,
    told: Any,
    weights: jax.Array,
    coefficients: jax.Array,
    capacity: int | None = None,
    chunk: int = 2048,
) -> tuple[jax.Array, jax.Array]:
    """(loss, sums): sums are those of `labelled_sums`, float32 [W], and the loss theirs by coefficients [W].

    The loss alone has gradients: by hidden, in its dtype, and by head, added up in float32. `measure` must be the same
    function at each call: one of a module. What is told has none, a head that `measure` uses for it neither.
    """
    tokens, _ = _by_device(hidden, told, weights, capacity)
    loss, sums = _loss(measure, tokens, head, coefficients, chunk)
    return loss, jax.lax.stop_gradient(sums)


def labelled_sums(
    measure: Measure,
    hidden: jax.Array,
    head: jax.Array,
    told: Any,
    weights: jax.Array,
    capacity: int | None = None,
    chunk: int = 2048,
) -> jax.Array:
    """`measure` summed with each weighting, float32 [W]. Not for gradients: these would keep all logits.

    hidden [S, T, D]; of each token `told` [S, T, …] tells what it is measured by; weights float32 [S, T, W] holds W
    weightings, all zero where a position has no label. head is [D, V]. `capacity` bounds the labelled positions of one
    device (all positions where None); `chunk` bounds those of one device whose logits exist at a time.
    """
    return _sums(measure, _by_device(hidden, told, weights, capacity)[0], head, chunk)


def labelled_nll(
    hidden: jax.Array,
    head: jax.Array,
    labels: jax.Array,
    labelled: jax.Array,
    capacity: int | None = None,
    chunk: int = 2048,
) -> jax.Array:
    """-log P(label) of each position, float32 [S, T], 0 where `labelled` is false. Not for gradients."""
    tokens, index = _by_device(hidden, labels, labelled[..., None].astype(jnp.float32), capacity)
    layout = _layout(head)
    narrow = constrain(head.astype(hidden.dtype), None, layout.vocabulary)

    def one_chunk(_: None, piece: _Tokens) -> tuple[None, jax.Array]:
        hidden, labels, weights = jax.tree.map(layout.together, piece)
        return None, layout.apart(cross_entropy(_logits(hidden, narrow), labels, narrow) * weights[..., 0])

    _, pieces = jax.lax.scan(one_chunk, None, _chunks(tokens, layout, chunk))
    found = _joined(pieces, tokens.weights.shape[1])
    if index is None:
        return found.reshape(labels.shape)
    places = jnp.zeros((len(found), labels.size // len(found)))
    return jax.vmap(lambda row, at, value: row.at[at].add(value))(places, index, found).reshape(labels.shape)


def next_tokens(array: jax.Array) -> jax.Array:
    """[S, T, …] shifted by one place to the left, zero at the end: hidden state t predicts token t + 1."""
    return jnp.concatenate([array[:, 1:], jnp.zeros_like(array[:, :1])], axis=1)


def cross_entropy(logits: jax.Array, labels: jax.Array, _: jax.Array, axis: int = 2) -> jax.Array:
    """-log P(label), a `Measure`; labels int32 [G, C]."""
    # a masked sum, not a gather: it stays local to each slice of the vocabulary
    at_label = jax.lax.broadcasted_iota(jnp.int32, logits.shape, axis) == jnp.expand_dims(labels, axis)
    label_logit = jnp.sum(jnp.where(at_label, logits, 0.0), axis)
    return jax.nn.logsumexp(logits, axis) - label_logit


def divergence(logits: jax.Array, reference: jax.Array, head: jax.Array, axis: int = 2) -> jax.Array:
    """KL(reference ‖ model) over the vocabulary, a `Measure`; `reference` are hidden states [G, C, D]."""
    expected, found = jax.nn.log_softmax(_logits(reference, head, axis), axis), jax.nn.log_softmax(logits, axis)
    return jnp.sum(jnp.exp(expected) * (expected - found), axis)


def reverse_divergence(logits: jax.Array, reference: jax.Array, head: jax.Array, axis: int = 2) -> jax.Array:
    """KL(model ‖ reference), as `divergence`."""
    expected, found = jax.nn.log_softmax(_logits(reference, head, axis), axis), jax.nn.log_softmax(logits, axis)
    return jnp.sum(jnp.exp(found) * (found - expected), axis)


def _sums(measure: Measure, tokens: _Tokens, head: jax.Array, chunk: int) -> jax.Array:
    layout = _layout(head)
    head = constrain(head.astype(tokens.hidden.dtype), None, layout.vocabulary)

    def add_chunk(total: jax.Array, piece: _Tokens) -> tuple[jax.Array, None]:
        hidden, told, weights = jax.tree.map(layout.together, piece)
        return total + _weighted(measure(_logits(hidden, head), told, head, 2), weights), None

    return jax.lax.scan(add_chunk, jnp.zeros(tokens.weights.shape[-1]), _chunks(tokens, layout, chunk))[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 4))
def _loss(
    measure: Measure, tokens: _Tokens, head: jax.Array, coefficients: jax.Array, chunk: int
) -> tuple[jax.Array, jax.Array]:
    """(loss, sums)."""
    sums = _sums(measure, tokens, head, chunk)
    return sums @ coefficients, sums


def _forward(
    measure: Measure, tokens: _Tokens, head: jax.Array, coefficients: jax.Array, chunk: int
) -> tuple[Any, Any]:
    """(loss, sums), and the loss's gradients by hidden and by head."""
    last, first = (functools.partial(_gradients, measure, chunk, axis) for axis in (2, 1))

    def on_cpu(*operands: Any) -> tuple[Any, Any]:
        value, (by_hidden, by_head) = first(*operands)
        # or XLA makes the turning around a part of each operation that reads it, one after the other
        return value, (by_hidden, with_layout_constraint(by_head, Layout((0, 1))))

    return jax.lax.platform_dependent(tokens, head, coefficients, cpu=on_cpu, default=last)


def _gradients(
    measure: Measure, chunk: int, axis: int, tokens: _Tokens, head: jax.Array, coefficients: jax.Array
) -> tuple[Any, Any]:
    """What `_forward` returns. The vocabulary is on this axis of the logits, and of the head's gradient's parts."""
    layout, logits = _layout(head), _LOGITS[axis]
    narrow = constrain(head.astype(tokens.hidden.dtype), None, layout.vocabulary)

    def placed(by_head: jax.Array) -> jax.Array:
        """[groups, D, V], laid out as `axis` says."""
        return jnp.moveaxis(constrain(by_head, layout.groups, None, layout.vocabulary), 2, axis)

    def add_chunk(totals: tuple[jax.Array, jax.Array], piece: _Tokens) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        hidden, told, weights = jax.tree.map(layout.together, piece)

        def loss(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
            sums = _weighted(measure(logits, told, narrow, axis), weights)
            return sums @ coefficients, sums

        by_logits, sums = jax.grad(loss, has_aux=True)(_logits(hidden, narrow, axis))
        # XLA:TPU would compute this anew for each tile of the products that read it
        by_logits = jax.lax.optimization_barrier(by_logits.astype(narrow.dtype))
        of_head, of_hidden = logits.replace("C", "D"), logits.replace("V", "D")
        by_head = jnp.einsum(f"GCD,{logits}->{of_head}", hidden, by_logits, preferred_element_type=jnp.float32)
        by_head = placed(jnp.moveaxis(totals[1] + by_head, axis, 2))
        # the parts that devices have of it, each from its slice of the vocabulary, meet in this dtype
        by_hidden = jnp.einsum(f"{logits},DV->{of_hidden}", by_logits, narrow)
        return (totals[0] + sums, by_head), layout.apart(jnp.moveaxis(by_hidden, axis, 2))

    pieces = _chunks(tokens, layout, chunk)
    zeros = jnp.zeros(tokens.weights.shape[-1]), placed(jnp.zeros((pieces.hidden.shape[1], *head.shape)))
    (sums, by_head), by_hidden = jax.lax.scan(add_chunk, zeros, pieces)
    by_hidden = _joined(by_hidden, tokens.weights.shape[1])
    by_head = jnp.moveaxis(by_head, axis, 2).sum(0).astype(head.dtype)
    return (sums @ coefficients, sums), (by_hidden, by_head)


def _backward(
    measure: Measure, chunk: int, gradients: tuple[jax.Array, jax.Array], cotangents: tuple[jax.Array, jax.Array]
) -> Any:
    by_hidden, by_head = ((cotangents[0] * gradient).astype(gradient.dtype) for gradient in gradients)
    none: Any = None
    return _Tokens(by_hidden, none, none), by_head, none


_loss.defvjp(_forward, _backward)


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


_LOGITS = {2: "GCV", 1: "GVC"}
"""Their axes, by which one is the vocabulary's."""


def _logits(hidden: jax.Array, head: jax.Array, axis: int = 2) -> jax.Array:
    return jnp.einsum(f"GCD,DV->{_LOGITS[axis]}", hidden, head, preferred_element_type=jnp.float32)


def _weighted(values: jax.Array, weights: jax.Array) -> jax.Array:
    """values [G, C] summed with each of weights [G, C, W]: [W]."""
    return jnp.einsum("GC,GCW->W", values, weights)


def _by_device(
    hidden: jax.Array, told: Any, weights: jax.Array, capacity: int | None
) -> tuple[_Tokens, jax.Array | None]:
    """The labelled positions of each device, at most `capacity`, and which they are of its positions (None: all).

    Weights are zero where there are fewer.
    """

    def split(array: jax.Array) -> jax.Array:
        rows = array.reshape(mesh_axis_size("batch"), -1, *array.shape[2:])
        return constrain(rows, "batch", *[None] * (rows.ndim - 1))

    tokens = jax.tree.map(split, _Tokens(hidden, told, weights))
    if capacity is None or capacity >= tokens.weights.shape[1]:
        return tokens, None
    select = jax.vmap(lambda mask: jnp.nonzero(mask, size=capacity, fill_value=-1)[0])
    index = select((tokens.weights != 0).any(-1))
    chosen = jax.tree.map(
        lambda array: jnp.take_along_axis(array, jnp.expand_dims(index, tuple(range(2, array.ndim))), axis=1), tokens
    )
    return chosen._replace(weights=chosen.weights * (index >= 0)[..., None]), index


def _chunks(tokens: _Tokens, layout: _Layout, chunk: int) -> _Tokens:
    """Each array [devices, M, …] → [chunks, groups, tokens, …], zero-padded, at most `chunk` tokens of each device."""
    devices, length = tokens.weights.shape[:2]
    chunks = -(-length // chunk)

    def split(array: jax.Array) -> jax.Array:
        rest = array.shape[2:]
        padded = jnp.pad(array, [(0, 0), (0, -length % chunks)] + [(0, 0)] * len(rest))
        pieces = jnp.moveaxis(padded.reshape(devices, chunks, -1, *rest), 1, 0)
        grouped = pieces.reshape(chunks, mesh_axis_size(layout.groups), -1, *rest)
        return constrain(grouped, None, layout.groups, layout.tokens, *[None] * len(rest))

    return jax.tree.map(split, tokens)


def _joined(chunks: jax.Array, length: int) -> jax.Array:
    """[chunks, groups, tokens, …] → [devices, M, …] with M = `length`, without the padding."""
    rest, devices = chunks.shape[3:], mesh_axis_size("batch")
    by_device = jnp.moveaxis(chunks.reshape(len(chunks), devices, -1, *rest), 0, 1)
    return by_device.reshape(devices, -1, *rest)[:, :length]
