"""The demo in several worlds: means over seeds, with the 95% interval of a mean."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from derta_jax.errors import UserError
from derta_jax.miniature.experiment import run_demo

STUDENT_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Two-sided 95% quantiles of Student's t with 1, 2, … degrees of freedom."""

COLOURS = ("#d55e00", "#0072b2", "#009e73", "#aa3377", "#e69f00", "#56b4e9")
KINDS = (("attacks", "asr"), ("helpfulness", "score"), ("over_refusal", "rate"))


def run_seeds(output: str | Path, seeds: int, console: Console, methods: Sequence[str]) -> dict[str, Any]:
    """`run_demo` with seeds 0, 1, … in `output/seed-K`; writes `seeds.json`, `seeds.md` and `seeds.svg`.

    Raises `UserError` for fewer than two seeds, or more than ten.
    """
    if not 2 <= seeds <= len(STUDENT_T) + 1:
        raise UserError(f"--seeds must be from 2 to {len(STUDENT_T) + 1} (got {seeds})")
    directory = Path(output)
    runs = [run_demo(directory / f"seed-{seed}", seed, console, methods) for seed in range(seeds)]
    means = mean_results(runs)
    (directory / "seeds.json").write_text(json.dumps(means, indent=2) + "\n", encoding="utf-8")
    (directory / "seeds.md").write_text(seeds_markdown(means), encoding="utf-8")
    draw_seeds(means, directory / "seeds.svg")
    console.print(seeds_markdown(means), highlight=False, markup=False)
    return means


def mean_results(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """`{"seeds": n, "models": {label: {kind: {name: {"mean", "half"}}}}}` in %, `half` the interval's half width.

    Each kind has a `mean over all` of its own: the means of each run's mean over its questions' kinds.
    """
    models: dict[str, Any] = {}
    for label in runs[0]["models"]:
        models[label] = {}
        for kind, figure in KINDS:
            by_name = {
                name: [100 * run["models"][label][kind][name][figure] for run in runs]
                for name in runs[0]["models"][label][kind]
            }
            by_name["mean over all"] = np.mean([*by_name.values()], axis=0).tolist()
            models[label][kind] = {name: _interval(values) for name, values in by_name.items()}
    return {"seeds": len(runs), "models": models}


def seeds_markdown(means: dict[str, Any]) -> str:
    """A table, a column for each model."""
    labels = [*means["models"]]
    lines = [f"|  | {' | '.join(labels)} |", f"| --- |{' ---: |' * len(labels)}"]
    for kind, _ in KINDS:
        lines.append(f"| **{kind.replace('_', '-')}** |{'  |' * len(labels)}")
        for name in means["models"][labels[0]][kind]:
            cells = [means["models"][label][kind][name] for label in labels]
            lines.append(f"| {name} | {' | '.join(map(_cell, cells))} |")
    return "\n".join([*lines, "", f"%, mean over {means['seeds']} seeds ± half its 95% interval (Student's t)", ""])


def draw_seeds(means: dict[str, Any], file: Path) -> None:
    """Bars of attack success by attack, and of over-refusal by kind, a colour for each model, with their intervals."""
    from matplotlib.figure import Figure

    models = {label: figures for label, figures in means["models"].items() if label != "base"}
    kinds = {"attacks": "attack success, %", "over_refusal": "over-refusal, %"}
    sizes = [len(next(iter(models.values()))[kind]) for kind in kinds]
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    for axes, (kind, title) in zip(figure.subplots(1, 2, width_ratios=sizes, sharey=True), kinds.items(), strict=True):
        for place, (label, figures) in enumerate(models.items()):
            heights = [interval["mean"] for interval in figures[kind].values()]
            # a share is not below 0, nor above 100
            below = [min(interval["half"], interval["mean"]) for interval in figures[kind].values()]
            above = [min(interval["half"], 100 - interval["mean"]) for interval in figures[kind].values()]
            spots = np.arange(len(heights)) + (place - (len(models) - 1) / 2) * 0.8 / len(models)
            error = {"yerr": [below, above], "error_kw": {"elinewidth": 0.8}}
            axes.bar(spots, heights, 0.8 / len(models), label=label, color=COLOURS[place % len(COLOURS)], **error)
        axes.set_xticks(range(len(heights)), list(figures[kind]), rotation=30, ha="right", fontsize=8)
        axes.set_title(title, loc="left", fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=len(models), frameon=False)
    figure.savefig(file, metadata={"Date": None})


def _interval(values: Sequence[float]) -> dict[str, float]:
    spread = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return {"mean": float(np.mean(values)), "half": STUDENT_T[len(values) - 2] * spread}


def _cell(interval: dict[str, float]) -> str:
    return f"{interval['mean']:.1f} ± {interval['half']:.1f}"
