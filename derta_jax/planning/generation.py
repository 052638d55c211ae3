"""What answering takes on a slice: the programs of `evaluation.slots`, compiled for chips that are not there."""

import time
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from derta_jax.errors import UserError
from derta_jax.evaluation.generate import STEPS_AT_A_TIME, bucket
from derta_jax.evaluation.slots import KEYS, VALUES, Prompts, Slots, advance, enter, free_slots
from derta_jax.evaluation.subject import generation_mesh
from derta_jax.models.attention import KVCache
from derta_jax.models.config import ModelConfig
from derta_jax.models.decoder import Decoder
from derta_jax.models.sharding import abstract_params, partition_spec
from derta_jax.planning.compiled import GIB, compile_lowered, device_bytes
from derta_jax.planning.load import Load
from derta_jax.planning.slices import Slice

Plan = dict[str, Any]
"""What `derta plan --generate --json` prints of one slice; docs/planning.md explains each field."""


def plan_generation(
    name: str, model: ModelConfig, place: Slice, load: Load, price: float | None = None, memory_only: bool = False
) -> Plan:
    """Memory of a chip, seconds of a step of all rows and dollars a million tokens.

    Seconds are the compiler's estimate, or those of reading weights and cache from HBM where these are more.

    The mesh is the one that `derta generate` takes by itself; weights and cache are bfloat16. Each row reads its prompt
    once and then makes `new` tokens, all slots being busy all the time. Raises `UserError` where it cannot be laid out.
    """
    started = time.monotonic()
    mesh = generation_mesh(model, place.devices())
    rows_on = mesh.size // mesh.shape["tensor"]
    if load.rows % rows_on:
        raise UserError(f"{load.rows} rows do not split over {rows_on} devices: ask for a multiple of {rows_on}")
    decoder = Decoder(model, dtype=jnp.bfloat16, scan_layers=False)
    params = _abstract_params(model, mesh)
    slots = _abstract_slots(decoder, mesh, load)
    prompts = _abstract_prompts(mesh, load)
    with jax.set_mesh(mesh):
        programs = {
            "step": advance.lower(decoder, params, slots, STEPS_AT_A_TIME, (0,)),
            "prefill": enter.lower(decoder, params, slots, prompts, (0,)),
        }
        found = {kind: compile_lowered(lowered, memory_only) for kind, lowered in programs.items()}
    peak = max(memory.peak for memory, _ in found.values())
    limit = place.generation.hbm_gib * GIB
    fits = peak <= limit and all(cost for _, cost in found.values())
    parts = {"parameters": device_bytes(params), "cache": device_bytes((slots.cache.keys, slots.cache.values))}
    # the compiler counts no waiting for weights that are fetched ahead: nothing is faster than reading them
    reading = sum(parts.values()) / place.generation.hbm_bytes
    cycles = {kind: cost.estimated_cycles for kind, (_, cost) in found.items() if cost and not memory_only}
    seconds = {
        kind: max(count / place.generation.clock_hz / (STEPS_AT_A_TIME if kind == "step" else 1), reading)
        for kind, count in cycles.items()
    }
    answer = seconds["prefill"] + load.new * seconds["step"] if fits and not memory_only else None
    tokens = answer and load.rows * load.new / answer
    dollars = place.generation.dollars if price is None else price
    return {
        "config": name,
        "slice": place.name,
        "chips": place.chips,
        "mesh": dict(mesh.shape),
        "rows": load.rows,
        "prompt_tokens": load.prompt,
        "new_tokens": load.new,
        "fits": fits,
        "hbm_gib": place.generation.hbm_gib,
        "peak_hbm_gib": peak / GIB if peak < float("inf") else None,
        "breakdown_gib": {part: size / GIB for part, size in parts.items()},
        "estimated_step_seconds": seconds.get("step"),
        "estimated_prefill_seconds": seconds.get("prefill"),
        "hbm_seconds": reading,
        "tokens_per_second": tokens,
        "tokens_per_second_per_chip": tokens and tokens / place.chips,
        "dollars_per_million_tokens": tokens and 1e6 / tokens / 3600 * place.chips * dollars,
        "compile_seconds": time.monotonic() - started,
    }


def _abstract_params(model: ModelConfig, mesh: Mesh) -> dict[str, Any]:
    """Of the model with its layers unrolled."""
    params = abstract_params(model, jnp.bfloat16, mesh)

    def one_layer(leaf: Any) -> Any:
        sharding = NamedSharding(mesh, PartitionSpec(*leaf.sharding.spec[1:]))
        return jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype, sharding=sharding)

    layer = jax.tree.map(one_layer, params.pop("layers"))
    return params | {f"layers_{place}": layer for place in range(model.layers)}


def _abstract_slots(decoder: Decoder, mesh: Mesh, load: Load) -> Slots:
    columns = bucket(load.prompt) + load.new
    shapes = jax.eval_shape(lambda: free_slots(decoder, load.rows, columns))
    keys = tuple(_placed(leaf, mesh, *KEYS) for leaf in shapes.cache.keys)
    values = tuple(_placed(leaf, mesh, *VALUES) for leaf in shapes.cache.values)
    cache = KVCache(keys, values, _placed(shapes.cache.positions, mesh, "batch"))
    return jax.tree.map(lambda leaf: _placed(leaf, mesh), shapes)._replace(cache=cache)


def _abstract_prompts(mesh: Mesh, load: Load) -> Prompts:
    """All rows at once, the most that enters together."""
    whole, real = (jax.ShapeDtypeStruct((load.rows,), dtype) for dtype in (jnp.int32, jnp.float32))
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), load.rows))
    ids = jax.ShapeDtypeStruct((load.rows, bucket(load.prompt)), jnp.int32)
    return jax.tree.map(lambda leaf: _placed(leaf, mesh), Prompts(ids, whole, whole, whole, real, keys))


def _placed(leaf: Any, mesh: Mesh, *axes: str | None) -> Any:
    spec = partition_spec(axes) if axes else PartitionSpec()
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))
