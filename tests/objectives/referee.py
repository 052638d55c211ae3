"""DeRTa's loss written down in PyTorch, row by row, from the paper's equation and the facts about the authors' code."""

import numpy as np
import torch

from derta_jax.models.config import ModelConfig
from derta_jax.models.lora import factor_shapes, target_rows

Row = tuple[list[int], list[int]]
"""(token ids, labels): labels[i] is what is learned at place i, -100 where nothing is."""


def mle_row(prompt: list[int], response: list[int], eos: int) -> Row:
    """-log P(response eos | prompt); the prompt may end in a harmful prefix."""
    return [*prompt, *response, eos], [-100] * len(prompt) + [*response, eos]


def rto_row(prompt: list[int], harmful: list[int], eos: int, refusal: int) -> Row:
    """-Σ_t log P(refusal | prompt, harmful_<t), eos's place included."""
    return [*prompt, *harmful, eos], [-100] * len(prompt) + [refusal] * (len(harmful) + 1)


def weighted_mean_loss(model, rows: list[Row], weights: list[float]) -> torch.Tensor:
    """Σ weight · nll / Σ weight over all labelled tokens of rows that are run one by one."""
    total, weight_sum = torch.zeros(()), 0.0
    for (token_ids, labels), weight in zip(rows, weights, strict=True):
        log_p = torch.log_softmax(model(torch.tensor([token_ids])).logits[0].float(), -1)
        for place, label in enumerate(labels):
            if label != -100:
                total = total - weight * log_p[place - 1, label]
                weight_sum += weight
    return total / weight_sum


def mean_of_means_loss(model, micro_batches: list[list[Row]]) -> torch.Tensor:
    """Each micro-batch's own mean over its labelled tokens, then their mean, as gradient accumulation gives it."""
    means = [weighted_mean_loss(model, rows, [1.0] * len(rows)) for rows in micro_batches]
    return torch.stack(means).mean()


def drawn_factors(config: ModelConfig) -> dict[str, dict[str, np.ndarray]]:
    """Low-rank factors of every linear layer, large enough to change what a model says."""
    draw = np.random.default_rng(0)
    return {
        row.name: {
            side: draw.normal(0, 0.2, shape).astype(np.float32) for side, shape in factor_shapes(config, row, 4).items()
        }
        for row in target_rows(config)
    }
