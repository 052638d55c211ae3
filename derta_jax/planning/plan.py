"""Will it fit, how fast, what does it cost: one config on one slice, and the search for a better or a fitting one."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from derta_jax.config import RunConfig
from derta_jax.errors import UserError
from derta_jax.models.config import ModelConfig
from derta_jax.models.lora import factor_shapes, target_rows
from derta_jax.models.params import count_parameters, parameter_table
from derta_jax.planning.compiled import GIB, Compiled, compile_for
from derta_jax.planning.estimate import dollars, estimate
from derta_jax.planning.slices import SLICES, Slice

Plan = dict[str, Any]
"""What `derta plan --json` prints of one config on one slice; docs/planning.md explains each field."""

KERNEL = "tpu_custom_call"
"""How the names of Pallas kernels begin."""

Say = Callable[[str], None]
"""Told what is being compiled, and once that is known, that it fits."""


@dataclasses.dataclass(frozen=True)
class Question:
    """A config, by the name it is shown under, on a slice; `price` is dollars a chip an hour, None the list price."""

    name: str
    config: RunConfig
    model: ModelConfig
    place: Slice
    price: float | None = None

    def but(self, **changes: Any) -> "Question":
        """With other values of config keys: `but(train={"accumulation": 2})`."""
        config = self.config.model_dump() | {
            section: (self.config.model_dump()[section] or {}) | values for section, values in changes.items()
        }
        return dataclasses.replace(self, config=RunConfig.model_validate(config))


def plan(question: Question, say: Say = lambda text: None, suggest: bool = True) -> Plan:
    """Compile it and say what comes out; where it does not fit, try what is nearest until something does."""
    words, hbm = f"{question.name} on {question.place.name}", question.place.generation.hbm_gib
    say(words)

    def tell(needed: float) -> None:
        if needed <= hbm * GIB:
            say(f"{words}, which fits ({needed / GIB:.1f} of {hbm} GiB)")

    compiled = compile_for(question.config, question.model, question.place, tell=tell)
    result = describe(question, compiled)
    if not compiled.fits and suggest:
        result["suggestion"] = nearest_fit(question, say)
    return result


def describe(question: Question, compiled: Compiled) -> Plan:
    """The plan of a compiled config; what is not known of one that does not fit is None."""
    config, place, cost = question.config, question.place, compiled.cost
    timed = cost if cost and math.isfinite(cost.estimated_cycles) else None
    found = timed and estimate(config, question.model, place, timed, compiled.breakdown["gradients"])
    hours = found and config.train.steps and config.train.steps * found.seconds / 3600
    return {
        "config": question.name,
        "slice": place.name,
        "chips": place.chips,
        "mesh": compiled.mesh,
        "accumulation": config.train.accumulation,
        "remat": config.train.remat,
        "fits": compiled.fits,
        "hbm_gib": place.generation.hbm_gib,
        "peak_hbm_gib": _finite(compiled.peak_bytes / GIB),
        "host_gib": cost and compiled.host_bytes / GIB,
        "breakdown_gib": {name: _finite(size / GIB) for name, size in compiled.breakdown.items()},
        "model_flops_per_token": found and found.model_flops_per_token,
        "step_flops": found and found.step_flops,
        "estimated_cycles": timed and timed.estimated_cycles,
        "cycle_seconds": found and found.compute_seconds,
        "kernels": cost and {name: n for name, n in cost.without_estimate.items() if name.startswith(KERNEL)},
        "kernel_seconds": found and found.kernel_seconds,
        "collective_bytes": cost and cost.collective_bytes,
        "collective_seconds": found and found.collective_seconds,
        "exposed_seconds": found and found.exposed_seconds,
        "host_seconds": found and found.host_seconds,
        "estimated_step_seconds": found and found.seconds,
        "estimated_step_seconds_upper": found and found.upper,
        "tokens_per_second_per_chip": found and found.tokens_per_second_per_chip,
        "mfu": found and found.mfu,
        "hours": hours,
        "dollars": hours and dollars(place, hours, question.price),
        "export_gb": export_gb(config, question.model),
        "compile_seconds": compiled.seconds,
        "suggestion": None,
    }


def export_gb(config: RunConfig, model: ModelConfig) -> dict[str, float | None]:
    """GB on disk of the whole model in bfloat16 and of its float32 adapter, and of the one tensor that a host holds."""
    largest = max(math.prod(row.hf_shape(model)) for row in parameter_table(model))
    adapter = sum(
        math.prod(shape)
        for row in (target_rows(model, config.lora.targets) if config.lora else ())
        for shape in factor_shapes(model, row, config.lora.rank if config.lora else 0).values()
    )
    return {
        "model": 2 * count_parameters(model) / 1e9,
        "adapter": 4 * adapter / 1e9 if config.lora else None,
        "largest_tensor": 2 * largest / 1e9,
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def nearest_fit(question: Question, say: Say) -> str | None:
    """The change nearest to a config that makes it fit, found by compiling one after the other; None if none does."""
    for candidate in _changes(question):
        words = difference(question, candidate)
        say(f"does {words} fit?")
        try:
            compiled = compile_for(candidate.config, candidate.model, candidate.place, memory_only=True)
        except UserError:
            continue
        if compiled.fits:
            return f"{words} ({compiled.peak_bytes / GIB:.1f} of {candidate.place.generation.hbm_gib} GiB)"
    return None


def difference(question: Question, other: Question) -> str:
    """What to type to get from one to the other: `train.remat=full train.accumulation=2`."""
    words = [] if question.place == other.place else [f"--slice {other.place.name}"]
    before, after = question.config.model_dump(mode="json"), other.config.model_dump(mode="json")
    if before["lora"] is None and after["lora"] is not None:
        words.append(f"lora.rank={after['lora']['rank']}")
    for section in ("train", "mesh"):
        words += [f"{section}.{key}={value}" for key, value in after[section].items() if value != before[section][key]]
    return " ".join(words)


def _changes(question: Question) -> Iterator[Question]:
    """From those that cost only speed, over a larger slice, to adapters, which are another run."""
    train, place = question.config.train, question.place
    offloads = train.remat == "offload"
    leanest = {"remat": "offload" if offloads else "full", "attention": "splash"}
    if any(getattr(train, key) != value for key, value in leanest.items()):
        yield question.but(train=leanest)
    if not offloads:
        yield question.but(train=leanest | {"remat": "offload"})
    for accumulation in (2, 4, 8, 16, 32, 64, 128):
        if accumulation > train.accumulation:
            yield question.but(train=leanest | {"accumulation": accumulation})
    for tensor in (2, 4, 8):
        if tensor > question.config.mesh.tensor:
            yield question.but(train=leanest, mesh={"tensor": tensor, "fsdp": -1})
    for larger in SLICES.values():
        if larger.family == place.family and larger.chips > place.chips and place.count == 1:
            yield dataclasses.replace(question, place=larger)
    if question.config.lora is None:
        yield question.but(train=leanest, lora={"rank": 96})


def search(question: Question, say: Say = lambda text: None) -> list[Plan]:
    """Plans of all candidates that fit, the fastest first, and of the config as it is; found by compiling each.

    Candidates are meshes, accumulation and remat; the objective, the batch and the precision stay what they are.
    Raises `UserError` where none of them can be compiled at all.
    """
    plans: list[Plan] = []
    problem: UserError | None = None
    candidates = [question, *_candidates(question)]
    for number, candidate in enumerate(candidates, 1):
        words = f"{number} of {len(candidates)}: {difference(question, candidate) or 'as it is'}"

        def numbered(text: str, words: str = words) -> None:
            say(f"{text}, {words}")

        try:
            plans.append(plan(candidate, numbered, suggest=False))
        except UserError as error:
            problem = problem or error
    if problem and not plans:
        raise problem
    fitting = [result for result in plans if result["fits"]]
    return sorted(fitting, key=lambda result: result["estimated_step_seconds"])


def _candidates(question: Question) -> Iterable[Question]:
    """What may be faster: less computed again, in as few micro-batches as leave room for what is kept.

    The host's memory is for a single one: more of them make room, too, but gather all weights once more each.
    """
    train, shape, chips = question.config.train, question.config.mesh, question.place.chips
    seen = {(train.remat, train.accumulation, shape.tensor)}
    accumulations = sorted({1, 2, 4, train.accumulation})
    remats = ("full", "attention", "dots", "offload")
    for tensor, accumulation, remat in itertools.product((1, 2), accumulations, remats):
        if remat == "offload" and accumulation > 1:
            continue
        rows = train.batch_size * tensor / chips / accumulation
        if (remat, accumulation, tensor) in seen or rows < 1 or rows % 1 or chips % tensor:
            continue
        if tensor > shape.tensor and rows > 1:
            continue  # tensor parallelism pays only where rows run out
        yield question.but(train={"remat": remat, "accumulation": accumulation}, mesh={"tensor": tensor, "fsdp": -1})
