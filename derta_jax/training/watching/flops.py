"""How much arithmetic a train step needs, and how much a chip can do: the two sides of MFU.

Counted after appendix B of PaLM (arXiv 2204.02311), 2 FLOPs for a multiplication with its addition:

    per useful token      6 · N                     N: parameters of the layers' matrix products
    per labelled token    6 · D · V                 the head
    per attended pair     12 · L · H · h            a token and one that it attends to: scores and weighted sum

What is counted is what the model needs in principle, however it is computed. Of a mixture's experts only the active
ones count, and its router; an embedding is looked up, not multiplied, so that it counts nothing unless it is the tied
head. A token attends to itself and to the tokens before it in its own row, at most `sliding_window` in all: T_avg is
the mean of that number, about T / 2 for rows of T tokens. PaLM puts T there, which counts the masked half as well.
What rematerialisation computes twice is counted once (MFU, not HFU). Norms, softmax, rope and the optimizer count
nothing.

With adapters the frozen weights get no gradient, so that theirs is 4 · N (forward, and backward to the activations),
plus 6 · the adapters' parameters; the head is frozen too, 4 · D · V.
"""

import math
from typing import NamedTuple

from derta_jax.config import Lora
from derta_jax.models.config import ModelConfig
from derta_jax.models.lora import factor_shapes, target_rows
from derta_jax.models.params import Parameter, parameter_table

BF16_PEAKS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA H100 80GB HBM3": 989.4e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989.4e12,
}
"""Dense bfloat16 FLOP/s of one device by JAX's `device_kind`, from the makers' data sheets."""


class TrainFlops(NamedTuple):
    """FLOPs of forward and backward pass: for each useful token, each labelled one, each pair that attends."""

    per_token: int
    per_labelled_token: int
    per_attended_pair: int

    def of(self, tokens: float, labelled: float, attended: float) -> float:
        """Of `tokens` useful tokens, `labelled` of them labelled, that attend to `attended` tokens on average."""
        return self.per_token * tokens + self.per_labelled_token * labelled + self.per_attended_pair * tokens * attended


def train_flops(config: ModelConfig, lora: Lora | None = None) -> TrainFlops:
    """What training a model, or adapters on it, takes."""
    factor = 4 if lora else 6
    adapters = 6 * adapter_parameters(config, lora) if lora else 0
    return TrainFlops(
        per_token=factor * layer_parameters(config) + adapters,
        per_labelled_token=factor * config.embed_dim * config.vocab_size,
        per_attended_pair=12 * config.layers * config.heads * config.head_dim,
    )


def flops_per_token(config: ModelConfig, lora: Lora | None, attended: float, labelled: float = 1.0) -> float:
    """FLOPs of a train step for one token that attends to `attended` tokens; `labelled`: the share with a label.

    With every token labelled this is PaLM's 6 N + 12 L H h T_avg.
    """
    return train_flops(config, lora).of(1, labelled, attended)


def layer_parameters(config: ModelConfig) -> int:
    """Parameters that a token is multiplied with in the layers: of a mixture the active experts', norms left out."""
    rows = parameter_table(config)
    return sum(_active(config, row, math.prod(row.shape(config))) for row in rows if _is_product(row))


def adapter_parameters(config: ModelConfig, lora: Lora) -> int:
    """Parameters of the adapters that a token is multiplied with: of a mixture the active experts'."""
    return sum(
        _active(config, row, math.prod(shape))
        for row in target_rows(config, lora.targets)
        for shape in factor_shapes(config, row, lora.rank).values()
    )


def mean_attended(length: int, window: int | None = None) -> float:
    """How many tokens a token of one row of `length` tokens attends to, itself included, on average."""
    full = min(length, window or length)
    return (full * (full + 1) / 2 + (length - full) * full) / length


def peak_flops(device_kind: str, dtype: str) -> float | None:
    """FLOP/s of one device, as JAX spells its kind, at its best in `dtype`; None where we do not know."""
    return BF16_PEAKS.get(device_kind) if dtype == "bfloat16" else None


def _is_product(row: Parameter) -> bool:
    return row.transposed and row.path != "head"


def _active(config: ModelConfig, row: Parameter, size: int) -> int:
    return size // config.experts * config.experts_per_token if "experts" in row.axes else size
