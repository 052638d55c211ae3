"""`derta plan`: from a config's name and slices to a table, compiling only what no earlier run has compiled."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from derta_jax.config import RunConfig
from derta_jax.planning import plan_cache
from derta_jax.planning.load import parse_load
from derta_jax.planning.published import architecture
from derta_jax.planning.slices import PRICES_AS_OF, SLICES, Slice
from derta_jax.waiting import waiting

GENERATION = (*plan_cache.TRAINING, "evaluation")
"""Rooms whose code makes the programs that answer."""


def plan_slices(
    name: str,
    config: RunConfig,
    places: Sequence[Slice],
    console: Console,
    searching: bool = False,
    price: float | None = None,
) -> list[dict[str, Any]]:
    """The plans of a config on each slice, in order; with `searching` those of all candidates that fit, fastest first.

    `price` is dollars a chip an hour, None for the list price. Raises `UserError` where config, model and slice do not
    go together, and where libtpu is not installed.
    """
    model = architecture(config.model.path)
    plans: list[dict[str, Any]] = []
    with waiting(console) as show:
        for place in places:
            asked = {"slice": place.name, "search": searching, "price": price}
            digest = plan_cache.key(config, model, asked)
            answer = plan_cache.read(digest)
            if answer is None:
                from derta_jax.planning.plan import Question, plan, search  # takes seconds to import

                def say(text: str) -> None:
                    show(f"compiling {text}")

                question = Question(name, config, model, place, price)
                answer = search(question, say) if searching else [plan(question, say)]
                plan_cache.write(digest, answer)
            plans += [result | {"config": name} for result in answer]
    return plans


def plan_answers(
    name: str, config: RunConfig, places: Sequence[Slice], text: str, console: Console, price: float | None = None
) -> list[dict[str, Any]]:
    """What answering with the config's model takes on each slice; `text` is as `parse_load` reads it."""
    load, model = parse_load(text), architecture(config.model.path)
    plans = []
    with waiting(console) as show:
        for place in places:
            digest = plan_cache.key(config, model, {"slice": place.name, "generate": text, "price": price}, GENERATION)
            answer = plan_cache.read(digest)
            if answer is None:
                from derta_jax.planning.generation import plan_generation  # takes seconds to import

                show(f"compiling generation on {place.name}")
                answer = plan_generation(name, model, place, load, price)
                plan_cache.write(digest, answer)
            plans.append(answer | {"config": name})
    return plans


def all_slices(config: RunConfig) -> list[Slice]:
    """The slices on which every chip gets at least one row, at most 256 chips each."""
    rows = config.train.batch_size // config.train.accumulation * config.mesh.tensor
    return [place for place in SLICES.values() if place.chips <= min(rows, 256)]


def show_plans(plans: Sequence[Mapping[str, Any]], console: Console) -> None:
    """Two tables for people, memory and speed, then what would fit where something does not."""
    if not plans:
        console.print("nothing that was tried fits: take a larger slice")
        return
    ways = [_way(plan) for plan in plans]
    host = ["host"] if any(plan["host_gib"] for plan in plans) else []
    memory = _table(f"{plans[0]['config']}: HBM of a chip, GiB", "peak", "of", *SHORT, *host)
    for plan, way in zip(plans, ways, strict=True):
        colour = "green" if plan["fits"] else "red"
        peak = "?" if plan["peak_hbm_gib"] is None else f"{plan['peak_hbm_gib']:.2f}"
        sizes = [*plan["breakdown_gib"].values(), *([plan["host_gib"]] if host else [])]
        parts = ("?" if size is None else f"{size:.1f}" for size in sizes)
        memory.add_row(plan["slice"], way, f"[{colour}]{peak}[/]", f"{plan['hbm_gib']}", *parts)
    console.print(memory)
    if any(plan["fits"] for plan in plans):
        speed = _table("a step, and the run", "s", "tokens/s/chip", "MFU", "moved, GB", "hours", "$")
        for plan, way in zip(plans, ways, strict=True):
            if plan["fits"]:
                speed.add_row(plan["slice"], way, *_speeds(plan))
        console.print(speed)
    if export := plans[0].get("export_gb"):
        adapter = f", the adapter {export['adapter']:.2f} GB" if export["adapter"] else ""
        console.print(
            f"export: {export['model']:.1f} GB in bfloat16{adapter}; one tensor of at most "
            f"{export['largest_tensor']:.2f} GB at a time in a host's memory",
            highlight=False,
        )
    for plan in plans:
        if not plan["fits"]:
            hint = plan["suggestion"]
            tried = f"this does: {hint}" if hint else "nor does anything that was tried"
            console.print(f"{plan['slice']} does not fit; {tried}", highlight=False, soft_wrap=True)
    console.print(
        "By the compiler's estimate, collectives hidden where they can be: real steps take 1.0 to 1.6 times as long. "
        f"Rows are taken to be full; prices are lists of {PRICES_AS_OF}. docs/planning.md says how figures are made.",
        style="dim",
        highlight=False,
    )


def show_answers(plans: Sequence[Mapping[str, Any]], console: Console) -> None:
    """A table for people of what answering takes."""
    first = plans[0]
    title = (
        f"{first['config']}: {first['rows']} answers at a time, {first['prompt_tokens']} + {first['new_tokens']} tokens"
    )
    table = _table(title, "HBM, GiB", "of", "params", "cache", "ms/token", "prompts, s", "tokens/s", "$/1M tokens")
    for plan in plans:
        colour = "green" if plan["fits"] else "red"
        peak = "?" if plan["peak_hbm_gib"] is None else f"{plan['peak_hbm_gib']:.2f}"
        parts = [f"{size:.1f}" for size in plan["breakdown_gib"].values()]
        speed = ["–"] * 4
        if plan["fits"]:
            speed = [
                f"{1e3 * plan['estimated_step_seconds']:.1f}",
                f"{plan['estimated_prefill_seconds']:.2f}",
                f"{plan['tokens_per_second']:,.0f}",
                f"{plan['dollars_per_million_tokens']:.2f}",
            ]
        table.add_row(plan["slice"], _mesh(plan), f"[{colour}]{peak}[/]", f"{plan['hbm_gib']}", *parts, *speed)
    console.print(table)
    console.print(
        f"By the compiler's estimate, all rows busy all the time; prices are lists of {PRICES_AS_OF}.",
        style="dim",
        highlight=False,
    )


SHORT = ("params", "optim.", "grads", "activ.", "rest")
"""The parts of `breakdown_gib`, as a heading has room for them."""


def _table(title: str, *figures: str) -> Table:
    """In a narrow terminal only `how` is wrapped: names and figures stay whole."""
    table = Table(box=box.SIMPLE, title=title, title_justify="left", pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("slice", no_wrap=True)
    table.add_column("how", overflow="fold")
    for heading in figures:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _way(plan: Mapping[str, Any]) -> str:
    """`fsdp 16, full` or `fsdp 8 × tensor 2, attention, ÷4` for four micro-batches."""
    return f"{_mesh(plan)}, {plan['remat']}" + (f", ÷{plan['accumulation']}" if plan["accumulation"] > 1 else "")


def _mesh(plan: Mapping[str, Any]) -> str:
    return " × ".join(f"{axis} {size}" for axis, size in plan["mesh"].items() if size > 1) or "one chip"


def _speeds(plan: Mapping[str, Any]) -> list[str]:
    money = ["–", "–"] if plan["hours"] is None else [f"{plan['hours']:.1f}", f"{plan['dollars']:,.0f}"]
    return [
        f"{plan['estimated_step_seconds']:.2f}",
        f"{plan['tokens_per_second_per_chip']:,.0f}",
        f"{plan['mfu']:.0%}",
        f"{sum(plan['collective_bytes'].values()) / 1e9:,.0f}",
        *money,
    ]


def config_name(path: str, overrides: Sequence[str]) -> str:
    """`llama3_8b_full`, and the overrides behind it."""
    return " ".join([Path(path).stem, *overrides])


def as_json(plans: Sequence[Mapping[str, Any]]) -> str:
    """Without numbers that JSON does not have."""
    return json.dumps(plans, indent=2, allow_nan=False)
