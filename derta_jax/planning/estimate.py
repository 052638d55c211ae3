"""Seconds, tokens, hours and dollars of a train step, from the program that XLA:TPU made of it.

    seconds = max(compute + kernels + exposed, collectives, host)

    compute      the compiler's estimated cycles / the clock
    kernels      Pallas kernels carry no estimate: their FLOPs at half of the chip's peak
    collectives  bytes / what the chip's links can send at once; an all-reduce sends its bytes twice, all others once.
                 Gradients that cross the network between slices add their bytes over that
    exposed      of these seconds, those of collectives that the program runs in one piece: nothing goes on beside them
    host         bytes to and from the memory of the host / the speed of that link, as if it went one way at a time

All other collectives are taken to hide behind compute, as is the host's part, and `upper` takes nothing to. What is in
neither: waiting for data, and all that keeps real chips from what the compiler expects of them. Estimates of dense
models, all parameters, on v5e and v5p come out at 66 to 70% MFU, published runs of such programs at 45 to 65%: a real
step takes 1.0 to 1.6 times `seconds`. It ranks plans, and bounds a bill from below.
"""

import dataclasses
from collections.abc import Mapping

from derta_jax.config import RunConfig
from derta_jax.models.config import ModelConfig
from derta_jax.planning.hlo_cost import ProgramCost
from derta_jax.planning.slices import HOST_BYTES, NETWORK_BYTES, Slice
from derta_jax.training.watching.flops import mean_attended, train_flops

KERNEL_SHARE_OF_PEAK = 0.5
FORWARD_AGAIN = 4 / 3
"""A rematerialised layer runs forward twice: 4 passes' worth of FLOPs, not 3."""
KEEP_KERNELS = ("none", "dots", "attention")
"""What of `train.remat` keeps the results of kernels."""


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Of one step: FLOPs of all chips, seconds; `mfu` and `tokens_per_second_per_chip` go by `seconds`."""

    model_flops_per_token: float
    step_flops: float
    compute_seconds: float
    kernel_seconds: float
    collective_seconds: float
    exposed_seconds: float
    host_seconds: float
    seconds: float
    upper: float
    tokens_per_second_per_chip: float
    mfu: float


def estimate(config: RunConfig, model: ModelConfig, place: Slice, cost: ProgramCost, gradient_bytes: float) -> Estimate:
    """`gradient_bytes` are those of one chip's part of the gradients, which cross between slices."""
    train, chip = config.train, place.generation
    tokens = train.batch_size * train.sequence_length
    attended = mean_attended(train.sequence_length, model.sliding_window)
    flops = train_flops(model, config.lora)
    step_flops = flops.of(tokens, tokens, attended)

    kernel_flops = 0.0
    if any("splash" in name for name in cost.without_estimate):
        kernel_flops += flops.per_attended_pair * attended * tokens
    if any("gmm" in name for name in cost.without_estimate):
        kernel_flops += (flops.per_token - _attention_flops(model, flops.per_token)) * tokens
    again = 1.0 if train.remat in KEEP_KERNELS else FORWARD_AGAIN

    collective = _seconds_on_links({kind: found.bytes for kind, found in cost.collectives.items()}, place)
    exposed = _seconds_on_links({kind: found.exposed for kind, found in cost.collectives.items()}, place)
    if place.count > 1:
        collective += 2 * gradient_bytes * train.accumulation / NETWORK_BYTES
    compute = cost.estimated_cycles / chip.clock_hz
    kernels = kernel_flops * again / place.chips / (KERNEL_SHARE_OF_PEAK * chip.peak_flops)
    host = cost.host_bytes / HOST_BYTES
    seconds = max(compute + kernels + exposed, collective, host)
    return Estimate(
        model_flops_per_token=step_flops / tokens,
        step_flops=step_flops,
        compute_seconds=compute,
        kernel_seconds=kernels,
        collective_seconds=collective,
        exposed_seconds=exposed,
        host_seconds=host,
        seconds=seconds,
        upper=compute + kernels + collective + host,
        tokens_per_second_per_chip=tokens / place.chips / seconds,
        mfu=step_flops / place.chips / chip.peak_flops / seconds,
    )


def _seconds_on_links(moved: Mapping[str, float], place: Slice) -> float:
    """Of so many bytes by kind of collective."""
    sent = sum(size * (2 if kind == "all-reduce" else 1) for kind, size in moved.items())
    return sent / place.link_bytes if place.link_bytes else 0.0


def _attention_flops(model: ModelConfig, per_token: float) -> float:
    """Of a mixture's FLOPs a token, those of attention's weights and the router, which XLA computes itself."""
    heads = model.head_dim * (2 * model.heads + 2 * model.kv_heads)
    experts = 3 * model.ffn_dim * model.experts_per_token
    outside = heads + model.experts
    return per_token * outside / (outside + experts)


def dollars(place: Slice, hours: float, price: float | None) -> float:
    """Of all chips; `price` is that of one chip an hour, None for the list price."""
    return hours * place.chips * (place.generation.dollars if price is None else price)
