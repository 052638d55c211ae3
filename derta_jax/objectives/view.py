"""The model as an objective sees it: forward passes, adapters on or off, a frozen reference, and losses of logits.

Letters: S sequences, T tokens of each, D model, L layers, W weightings. What is said of token t is computed from the
hidden state of the token before it: the shift is made here.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from derta_jax.models.decoder import Decoder, head_matrix
from derta_jax.models.lora import DEFAULT, switched
from derta_jax.objectives.token_loss import (
    divergence,
    labelled_cross_entropy,
    labelled_loss,
    labelled_nll,
    next_tokens,
    reverse_divergence,
)

Batch = dict[str, jax.Array]
"""A micro-batch: `data.loader.Batch` without its accumulation axis."""


class Forward(NamedTuple):
    """`hidden` [S, T, D] are normed; `layers` [L, S, T, D] are the residual stream behind each layer, if asked for;
    `router` are a mixture's statistics by layer.
    """

    hidden: jax.Array
    layers: jax.Array | None
    router: dict[str, jax.Array] | None


def count_before(mask: jax.Array, segment_ids: jax.Array) -> jax.Array:
    """How often `mask` [S, T] holds before each token in its segment: of an answer's tokens, their place in it."""
    before = jnp.cumsum(mask, axis=1) - mask
    starts = jnp.diff(segment_ids, axis=1, prepend=-1) != 0
    return before - jax.lax.cummax(jnp.where(starts, before, 0), axis=1)


@dataclasses.dataclass(frozen=True)
class View:
    """A model and its variables. Switching adapters changes data alone: nothing is compiled for it."""

    model: Decoder
    variables: Any
    refusal_id: int
    label_capacity: int | None = None
    loss_chunk: int = 128

    def without(self, *adapters: str) -> "View":
        """The model with these adapters switched off."""
        on = self.variables["lora_scale"]["layers"].keys() - {*adapters}
        return dataclasses.replace(self, variables=switched(self.variables, on))

    def frozen(self) -> "View":
        """The same numbers, without gradients."""
        return dataclasses.replace(self, variables=jax.lax.stop_gradient(self.variables))

    def forward(self, batch: Batch, key: jax.Array | None = None, layers: bool = False) -> Forward:
        """One pass over a micro-batch; adapters' inputs are dropped where there is a `key`."""
        written: Any
        hidden: Any
        hidden, written = self.model.apply(
            self.variables,
            batch["token_ids"],
            batch["segment_ids"],
            batch["positions"],
            batch.get("trunk"),
            method="hidden_states",
            rngs=None if key is None else {"dropout": key},
            mutable=["router", *(["residual"] if layers else [])],
        )
        router = written["router"]["layers"]["statistics"][0] if self.model.config.experts else None
        return Forward(hidden, written["residual"]["layers"]["output"][0] if layers else None, router)

    def cross_entropy(
        self, forward: Forward, labels: jax.Array, weights: jax.Array, coefficients: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """(loss, sums): -log P(label) summed with each of `weights` [S, T, W], and these [W] summed by `coefficients`.

        `labels` int32 [S, T]. The loss alone has gradients, and the logits never exist as a whole (`token_loss`).
        """
        return labelled_cross_entropy(
            forward.hidden,
            self.head,
            next_tokens(labels),
            next_tokens(weights.astype(jnp.float32)),
            coefficients,
            self.label_capacity,
            self.loss_chunk,
        )

    def divergence(
        self, forward: Forward, reference: Forward, weights: jax.Array, coefficients: jax.Array, reverse: bool = False
    ) -> tuple[jax.Array, jax.Array]:
        """(loss, sums) as `cross_entropy`, of KL(reference ‖ model) over the whole vocabulary, or the `reverse` of it.

        The reference's hidden states go through the same head, and have no gradients.
        """
        return labelled_loss(
            reverse_divergence if reverse else divergence,
            forward.hidden,
            self.head,
            jax.lax.stop_gradient(reference.hidden),
            next_tokens(weights.astype(jnp.float32)),
            coefficients,
            self.label_capacity,
            self.loss_chunk,
        )

    def reference_nll(self, batch: Batch, labels: jax.Array, labelled: jax.Array) -> jax.Array:
        """`nll` of the model that training begins with: as computed before, or beneath the adapter that is trained."""
        if "reference_nll" in batch:
            return batch["reference_nll"]
        beneath = self.without(DEFAULT).frozen()
        return beneath.nll(beneath.forward(batch), labels, labelled)

    def nll(self, forward: Forward, labels: jax.Array, labelled: jax.Array) -> jax.Array:
        """-log P(label), float32 [S, T], 0 where `labelled` is false. Has no gradients."""
        hidden = jax.lax.stop_gradient(forward.hidden)
        found = labelled_nll(
            hidden, self.head, next_tokens(labels), next_tokens(labelled), self.label_capacity, self.loss_chunk
        )
        return jnp.pad(found, ((0, 0), (1, 0)))[:, :-1]

    def loss_of_nll(
        self, measure: Callable[[jax.Array], tuple[jax.Array, Any]], forward: Forward, labels: jax.Array, labelled: Any
    ) -> tuple[jax.Array, Any]:
        """A loss that is any function of `nll`: (loss, what else `measure` returns), and the loss has gradients.

        Its gradient is that of Σ w · nll with w its derivative by each token's nll, which is why the logits need not
        be kept: they are made once for the value, and once for the gradient.
        """
        loss, pull, rest = jax.vjp(measure, self.nll(forward, labels, labelled), has_aux=True)
        (slopes,) = pull(jnp.ones_like(loss))
        slopes = jnp.where(labelled, slopes, 0)[..., None]
        linear, _ = self.cross_entropy(forward, labels, slopes, jnp.ones(1))
        return jax.lax.stop_gradient(loss) + (linear - jax.lax.stop_gradient(linear)), rest

    @property
    def head(self) -> jax.Array:
        """[D, V]."""
        return head_matrix(self.variables["params"])
