"""How cost scales with work: our steps by sequence length, batch, vocabulary and share of safety rows."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from derta_jax.benchmark.config import load_bench
from derta_jax.benchmark.contest import machine, run_bench, versions
from derta_jax.benchmark.report import NAMES

SWEEPS: Mapping[str, Sequence[float]] = {
    "train.sequence_length": (512, 1024, 2048, 4096),
    "train.batch_size": (8, 16, 32),
    "synthetic.architecture.vocab_size": (8_000, 32_000, 128_256),
    "synthetic.safety_share": (0.0, 0.09, 0.5, 1.0),
}
"""One key at a time takes these values; the others stay as the config has them."""
OURS = ("padded", "packed")
COLOURS = {"padded": "#8a8f98", "packed": "#0072b2"}


def sweep(path: str | Path, overrides: Sequence[str], console: Console) -> dict[str, Any]:
    """Useful tokens/s of both ways, padded and packed, at each value of each key, and how full their sequences are.

    What is the config's own value of several keys is raced once. Raises `UserError` for bad input, before the first
    race.
    """
    cases = {
        (key, value): load_bench(path, [*overrides, f"contenders=[{','.join(OURS)}]", f"{key}={value}"])
        for key, values in SWEEPS.items()
        for value in values
    }
    found: dict[str, list[dict[str, Any]]] = {key: [] for key in SWEEPS}
    raced: dict[str, dict[str, Any]] = {}
    for done, ((key, value), bench) in enumerate(cases.items()):
        console.print(f"{done + 1} of {len(cases)}: {key}={value:g}", highlight=False)
        settings = bench.model_dump_json()
        if settings not in raced:
            raced[settings] = _speeds(run_bench(bench, console)["contenders"])
        found[key].append({"value": value} | raced[settings])
    return {"machine": machine(), "versions": versions(), "sweeps": found}


def _speeds(contenders: Mapping[str, Any]) -> dict[str, Any]:
    speeds = {name: contenders[name]["useful_tokens_per_second"] for name in OURS}
    padded = {name: contenders[name]["padded_tokens_per_second"]["median"] for name in OURS}
    return {"useful_tokens_per_second": speeds, "fill": {name: speeds[name]["median"] / padded[name] for name in OURS}}


def sweep_table(results: Mapping[str, Any]) -> Table:
    """For the terminal."""
    table = Table("", "", *(f"{NAMES[name]}, useful tokens/s" for name in OURS), "filled", box=box.SIMPLE_HEAD)
    for key, points in results["sweeps"].items():
        for point in points:
            speeds = [f"{point['useful_tokens_per_second'][name]['median']:,.0f}" for name in OURS]
            fills = " / ".join(f"{point['fill'][name]:.0%}" for name in OURS)
            table.add_row(key, f"{point['value']:g}", *speeds, fills)
    return table


def write_sweep(results: Mapping[str, Any], directory: Path) -> None:
    """sweep.json and sweep.svg."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "sweep.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    draw_sweep(results, directory / "sweep.svg")


def draw_sweep(results: Mapping[str, Any], file: Path) -> None:
    """A panel for each key: useful tokens a second of both ways, medians with their lowest and highest."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 2.6), layout="constrained")
    panels = figure.subplots(1, len(results["sweeps"]), sharey=True, squeeze=False)[0]
    for axes, (key, points) in zip(panels, results["sweeps"].items(), strict=True):
        places = range(len(points))
        for name in OURS:
            speeds = [point["useful_tokens_per_second"][name] for point in points]
            medians = [speed["median"] for speed in speeds]
            spread = [[s["median"] - s["low"] for s in speeds], [s["high"] - s["median"] for s in speeds]]
            axes.errorbar(places, medians, yerr=spread, marker="o", color=COLOURS[name], label=NAMES[name])
        axes.set_xticks(list(places), [f"{point['value']:g}" for point in points])
        axes.set_xlabel(key.rpartition(".")[2].replace("_", " "))
        axes.spines[["top", "right"]].set_visible(False)
    first = figure.axes[0]
    first.set(ylabel="useful tokens a second", ylim=0)
    first.legend(frameon=False, fontsize="small")
    figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)
