"""The model as an objective sees it: forward passes, adapters on or off, a frozen reference, and losses of logits.

Letters: S sequences, T tokens of each, D model, L layers, W weightings. What is said of token t is computed from the
hidden state of the token before it: the shift is made here.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from derta_jax.models.decoder import Decoder, head_matrix
from derta_jax.models.lora import switched
from derta_jax.objectives.token_loss import labelled_cross_entropy, next_tokens

Batch = dict[str, jax.Array]
"""A micro-batch: `data.loader.Batch` without its accumulation axis."""


class Forward(NamedTuple):
    """`hidden` [S, T, D] are normed; `layers` [L, S, T, D] are the residual stream behind each layer, if asked for;
    `router` are a mixture's statistics by layer.
    """

    hidden: jax.Array
    layers: jax.Array | None
    router: dict[str, jax.Array] | None


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
            head_matrix(self.variables["params"]),
            next_tokens(labels),
            next_tokens(weights.astype(jnp.float32)),
            coefficients,
            self.label_capacity,
            self.loss_chunk,
        )
