"""A race as people read it: a table for the terminal and a page of Markdown, and bars."""

import json
from pathlib import Path
from typing import Any

from rich import box
from rich.filesize import decimal
from rich.table import Table

NAMES = {
    "original": "PyTorch, authors' way",
    "torch": "PyTorch at its best",
    "padded": "JAX, padded",
    "packed": "JAX, packed",
}
COLUMNS = ("", "useful tokens/s", "low–high", "s/step", "padded tokens/s", "MFU", "peak memory", "loss")


def rows_of(results: dict[str, Any]) -> list[list[str]]:
    """A row for each contender, in the order of `COLUMNS`; the loss is the last step's."""
    rows = []
    for name, each in results["contenders"].items():
        speed, losses = each["useful_tokens_per_second"], each["loss"]
        rows.append(
            [
                NAMES[name],
                f"{speed['median']:,.0f}",
                f"{speed['low']:,.0f}–{speed['high']:,.0f}",
                f"{each['step_seconds']['median']:.2f}",
                f"{each['padded_tokens_per_second']['median']:,.0f}",
                f"{each['mfu']['median']:.0%}",
                decimal(each["peak_bytes"]),
                f"{losses[-1]:.5f}",
            ]
        )
    return rows


def ratios_of(results: dict[str, Any]) -> list[str]:
    """Ours against theirs, in words."""
    told = []
    for ours in ("packed", "padded"):
        for theirs in ("original", "torch"):
            if f"{ours}/{theirs}" in results["ratios"]:
                told.append(f"{NAMES[ours]} is {results['ratios'][f'{ours}/{theirs}']:.2f} × {NAMES[theirs]}")
    return told


def table_of(results: dict[str, Any]) -> Table:
    """For the terminal, where 80 columns do not cut a number."""
    shown = [COLUMNS.index(column) for column in ("", "useful tokens/s", "s/step", "MFU", "peak memory", "loss")]
    rows, table = rows_of(results), Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for place in shown:
        width = max(len(row[place]) for row in rows)
        table.add_column(COLUMNS[place], justify="right" if place else "left", min_width=width)
    for row in rows:
        table.add_row(*(row[place] for place in shown))
    return table


def markdown_of(results: dict[str, Any]) -> str:
    """The same for a page, with what it ran on."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "| --- |" + " ---: |" * (len(COLUMNS) - 1)]
    lines += ["| " + " | ".join(row) + " |" for row in rows_of(results)]
    machine, versions = results["machine"], results["versions"]
    peaks = ", ".join(f"{name} {flops / 1e9:,.0f}" for name, flops in machine["peak_flops"].items())
    on = f"{machine['processor']}, {machine['cores']} cores; a plain product, GFLOP/s: {peaks}"
    if machine["accelerator"]:
        on = f"{machine['accelerator']}; {on}"
    used = ", ".join(f"{name} {version}" for name, version in versions.items())
    return "\n".join([*lines, "", *(f"* {line}" for line in ratios_of(results)), "", f"{on}. {used}.", ""])


def write_report(results: dict[str, Any], directory: Path) -> None:
    """bench.json, bench.md and bench.svg."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "bench.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    (directory / "bench.md").write_text(markdown_of(results), encoding="utf-8")
    draw(results, directory / "bench.svg")


def draw(results: dict[str, Any], file: Path) -> None:
    """Useful tokens a second as bars, with their lowest and highest; SVG or PNG by the file's name."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 2.4), layout="constrained")
    axes = figure.subplots()
    names = [NAMES[name] for name in results["contenders"]][::-1]
    speeds = [each["useful_tokens_per_second"] for each in results["contenders"].values()][::-1]
    medians = [speed["median"] for speed in speeds]
    errors = [
        [median - speed["low"] for median, speed in zip(medians, speeds, strict=True)],
        [speed["high"] - median for median, speed in zip(medians, speeds, strict=True)],
    ]
    bars = axes.barh(names, medians, xerr=errors, color="#0072b2", error_kw={"ecolor": "#5c6370"})
    axes.bar_label(bars, [f"{median:,.0f}" for median in medians], padding=4)
    axes.set_xlabel("useful tokens a second")
    axes.set_xlim(0, 1.15 * max(speed["high"] for speed in speeds))
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)
