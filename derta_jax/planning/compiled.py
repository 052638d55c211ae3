"""The train step of a config compiled for a slice that is not there: its memory, its cycles, its collectives.

It is the step that `derta train` runs (`training.program`). Without data every row is taken to fill its sequence with
labelled tokens, the most that a batch can hold.
"""

import contextlib
import dataclasses
import math
import re
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
from jax.experimental.compilation_cache import compilation_cache

from derta_jax.config import RunConfig
from derta_jax.errors import UserError
from derta_jax.models.config import ModelConfig
from derta_jax.planning.early import Tell, memory_seen
from derta_jax.planning.hlo_cost import ProgramCost, program_cost
from derta_jax.planning.slices import Slice
from derta_jax.training.mesh import make_mesh
from derta_jax.training.program import BatchShape, Program, make_program

GIB = 2**30
FAST = -1.0
"""Compiler effort at which memory is right to a few percent and time is not."""


@dataclasses.dataclass(frozen=True)
class Compiled:
    """Of one chip, in bytes: `peak_bytes` is the most that a step ever holds, or what it would have to hold, and
    `breakdown` what of that are parameters, optimizer, gradients, activations (kept between the passes) and the rest;
    `host_bytes` is what it keeps in the memory of its host.

    `cost` is None where memory did not suffice for a program; its cycles are NaN where that was compiled for its memory
    alone.
    """

    fits: bool
    mesh: dict[str, int]
    peak_bytes: float
    host_bytes: float
    limit_bytes: float
    breakdown: dict[str, float]
    cost: ProgramCost | None
    seconds: float


def compile_for(
    config: RunConfig, model: ModelConfig, place: Slice, memory_only: bool = False, tell: Tell = lambda size: None
) -> Compiled:
    """Compile the train step for a slice; `tell` is told how many bytes a chip needs as soon as the compiler knows.

    Raises `UserError` where config, model and slice do not go together.
    """
    started = time.monotonic()
    mesh = make_mesh(config.mesh, place.devices())
    program = make_program(config, model, mesh, full_batch(config, mesh), refusal_id=0, steps=config.train.steps or 1)
    limit = place.generation.hbm_gib * GIB
    memory, cost = compile_lowered(program.lower(), memory_only, tell)
    fits = cost is not None and memory.peak <= limit
    breakdown = _split(program, memory.peak)
    seconds = time.monotonic() - started
    return Compiled(fits, dict(mesh.shape), memory.peak, memory.host, limit, breakdown, cost, seconds)


class Memory(NamedTuple):
    """Bytes of one chip: at most at once in its own, and in that of its host."""

    peak: float
    host: float


def compile_lowered(
    lowered: Any, memory_only: bool = False, tell: Tell = lambda size: None
) -> tuple[Memory, ProgramCost | None]:
    """What memory a program takes, and what it costs: None where memory did not suffice for it."""
    totals = [math.inf]

    def told(size: float) -> None:
        totals.append(size)
        tell(size)

    # programs for chips that are not there cannot be read back from JAX's cache
    settings = _jax_settings(jax_enable_compilation_cache=False, jax_exec_time_optimization_effort=FAST * memory_only)
    with settings, memory_seen(told) as options:
        try:
            compiled = lowered.compile(compiler_options=options)
        except jax.errors.JaxRuntimeError as error:
            needed = needed_bytes(str(error))
            if needed is None:
                raise
            return Memory(needed, 0.0), None
    cost = program_cost(compiled.as_text())
    if memory_only:
        cost = dataclasses.replace(cost, estimated_cycles=math.nan)
    stats = compiled.memory_analysis()
    # XLA's peak is that of the largest heap, which may be the host's; HBM's is no more than all that is put there
    return Memory(min(stats.peak_memory_in_bytes, *totals), stats.host_temp_size_in_bytes), cost


@contextlib.contextmanager
def _jax_settings(**values: Any) -> Iterator[None]:
    def update(values: dict[str, Any]) -> None:
        for name, value in values.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()  # which remembers whether it is used

    before = {name: jax.config.values[name] for name in values}
    try:
        update(values)
        yield
    finally:
        update(before)


def full_batch(config: RunConfig, mesh: Any) -> BatchShape:
    """Rows that fill their sequences, every token labelled. Raises `UserError` where there are too few of them."""
    train = config.train
    shards = mesh.size // mesh.shape["tensor"]
    hands = shards * train.accumulation
    if train.batch_size % hands:
        raise UserError(
            f"train.batch_size = {train.batch_size} rows do not split over {shards} devices × train.accumulation = "
            f"{train.accumulation}: use more of mesh.tensor, or less accumulation"
        )
    rows = train.batch_size // hands
    return BatchShape(train.batch_size, train.sequence_length, train.accumulation, rows * train.sequence_length)


def needed_bytes(error: str) -> float | None:
    """What a program would have to hold, by the compiler's own message; None for other errors.

    Arguments are in it, though the message speaks of temporaries.

    Raises `UserError` where an operation does not fit VMEM, of which a larger slice has no more.
    """
    if "RESOURCE_EXHAUSTED" not in error:
        return None
    if "memory space vmem" in error:
        raise UserError(
            f"XLA cannot compile this step for these chips: {error.splitlines()[0]}\n"
            "what matters are the shapes on one chip: try another train.accumulation, train.sequence_length or mesh"
        )
    found = re.search(r"([\d.]+)([KMGT])i?B?\)? (?:exceeds|of) ", error)
    return float(found[1]) * 2 ** (10 * ("KMGT".index(found[2]) + 1)) if found else math.inf


def _split(program: Program, peak: float) -> dict[str, float]:
    state = program.abstract_state
    trainable = device_bytes(state.trainable)
    parts = {
        "parameters": trainable + device_bytes(program.abstract_frozen),
        "optimizer": device_bytes(state.opt_state),
        "gradients": trainable,
        "activations": _kept_activations(program),
    }
    return parts | {"rest": max(0.0, peak - sum(parts.values()))}


def device_bytes(tree: Any) -> float:
    """Of one device."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _kept_activations(program: Program) -> float:
    """Bytes a device that the layers of one micro-batch keep for their backward pass: what JAX says it will keep.

    Weights that are kept as well do not count, nor what the host keeps. None of it is split over `tensor`.
    """
    shape = program.batch
    ids = jax.ShapeDtypeStruct((shape.sequences // shape.accumulation, shape.length), "int32")
    variables = {**program.abstract_frozen, **program.abstract_state.trainable}

    def hidden_states(variables: Any, token_ids: Any) -> Any:
        return program.model.apply(variables, token_ids, token_ids, token_ids, method="hidden_states")

    def backward(variables: Any, token_ids: Any) -> Any:
        return jax.vjp(lambda variables: hidden_states(variables, token_ids), variables)[1]

    layers = program.model.config.layers
    kept = jax.make_jaxpr(backward)(_unplaced(variables), ids).out_avals
    stacked = [leaf for leaf in kept if leaf.shape[:1] == (layers,) and leaf.size % ids.size == 0 and leaf.ndim > 3]
    weights = {leaf.shape for leaf in jax.tree.leaves(variables)}
    here = [leaf for leaf in stacked if leaf.shape not in weights and leaf.memory_space == jax.memory.Space.Device]
    total = sum(leaf.size * leaf.dtype.itemsize for leaf in here)
    return total / (program.mesh.size // program.mesh.shape["tensor"])


def _unplaced(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)
