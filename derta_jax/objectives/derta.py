"""Decoupled Refusal Training: MLE after a harmful prefix and reinforced transition optimisation, in one pass.

    L = -E log P(r | q, r̂_<k) - E Σ_t log P(sorry | q, r̂_<t)        (arXiv 2407.09121, equation 2)

The vanilla, RecAug and RTO-only ablations are the same objective over other recipes' rows.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from derta_jax.config import Objective
from derta_jax.models.decoder import Decoder, head_matrix
from derta_jax.models.moe import load_balancing_loss
from derta_jax.objectives.token_loss import labelled_cross_entropy, next_tokens

Loss = Callable[[Any, dict[str, jax.Array], jax.Array], tuple[jax.Array, jax.Array, dict[str, jax.Array]]]
"""(variables, micro-batch, dropout key) → (loss_sum, weight_sum, metrics): sums, which whoever adds them up divides."""


def derta_loss(model: Decoder, objective: Objective, refusal_id: int, label_capacity: int | None = None) -> Loss:
    """The loss of micro-batches laid out as `data.loader.Batch` describes, without the accumulation axis.

    Each kept token weighs 1, each kept token of an RTO row `rto_weight`; the mean is loss_sum / weight_sum. Metrics
    are the unweighted sums and counts of both kinds.

    A mixture of experts adds `router_aux_weight` times its load-balancing loss, that of the micro-batch's real tokens;
    micro-batches count by their labels. Its metric counts by tokens.
    """

    def loss(
        variables: Any, batch: dict[str, jax.Array], key: jax.Array
    ) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
        written: Any
        hidden: Any
        hidden, written = model.apply(
            variables,
            batch["token_ids"],
            batch["segment_ids"],
            batch["positions"],
            method="hidden_states",
            rngs={"dropout": key},
            mutable=["router"],
        )
        labels = jnp.where(batch["rto"], refusal_id, batch["token_ids"])
        kinds = jnp.stack([batch["keep"] & ~batch["rto"], batch["keep"] & batch["rto"]], -1).astype(jnp.float32)
        weights = jnp.array([1.0, objective.rto_weight])
        loss_sum, sums = labelled_cross_entropy(
            hidden,
            head_matrix(variables["params"]),
            next_tokens(labels),
            next_tokens(kinds),
            weights,
            label_capacity,
            objective.loss_chunk,
        )
        counts = kinds.sum((0, 1))
        weight_sum = counts @ weights
        metrics = {
            "mle_sum": sums[0],
            "mle_tokens": counts[0],
            "rto_sum": sums[1],
            "rto_tokens": counts[1],
        }
        if model.config.experts:
            (statistics,) = written["router"]["layers"]["statistics"]
            tokens = (batch["segment_ids"] > 0).sum()
            # a micro-batch may be padding alone
            balance = load_balancing_loss(statistics, jnp.maximum(tokens, 1))
            loss_sum += objective.router_aux_weight * balance * weight_sum
            metrics |= {"aux_sum": balance * tokens, "aux_tokens": tokens.astype(jnp.float32)}
        return loss_sum, weight_sum, metrics

    return loss
