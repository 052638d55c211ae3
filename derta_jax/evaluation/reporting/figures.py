"""The report's figures, as SVG text to put inside a page.

Each function takes plain numbers, and marks from `marks`, so that a model looks the same everywhere. Figures are drawn
for a phone's width and have no legend: the page writes it. The text stays text. Colours follow the page's `--ink`,
`--faint`, `--rule` and `--series-N` where it sets them. Ids carry the figure's name, so that several can share a page.
"""

import io
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from html import escape
from itertools import count
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator, PercentFormatter

from derta_jax.evaluation.reporting.findings import TOO_MUCH, Spread
from derta_jax.evaluation.reporting.rates import Group

# Okabe & Ito 2008 for any colour vision, without black and yellow and with Paul Tol's darker purple.
SERIES = ("#d55e00", "#0072b2", "#009e73", "#aa3377", "#e69f00", "#56b4e9", "#5a5a5a")
_MARKERS = "osD^vPX"
_GLYPHS = "●■◆▲▼✚✖"

_INK = "#23272e"
_FAINT = "#5c6370"
_GRID = "#e1e4e8"
_AXIS = "#b6bcc5"
_PAGE_COLOURS = {_INK: "ink", _FAINT: "faint", _GRID: "rule", _AXIS: "axis"} | {
    colour: f"series-{i}" for i, colour in enumerate(SERIES)
}
_WIDTH = 4.4  # inches
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.size": 9.5,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _AXIS,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.8,
    "xtick.color": _FAINT,
    "ytick.color": _FAINT,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "lines.linewidth": 1.7,
    "lines.markersize": 5,
}


@dataclass(frozen=True)
class Mark:
    """A model's colour and shape; the shape alone tells models apart without colour."""

    colour: str
    marker: str
    glyph: str

    @property
    def css(self) -> str:
        return _css(self.colour)


def marks(names: Iterable[str]) -> dict[str, Mark]:
    """A mark per name, in order of first appearance; 49 differ."""
    size = len(SERIES)
    shapes = [(i + i // size) % size for i in range(size * size)]
    return {
        name: Mark(SERIES[i % size], _MARKERS[shapes[i % len(shapes)]], _GLYPHS[shapes[i % len(shapes)]])
        for i, name in enumerate(dict.fromkeys(names))
    }


def rate_bars(group: Group, marked: Mapping[str, Mark]) -> str:
    """Bars with Wilson intervals: a block per measure, a bar per model with its percentage beside it."""
    bar, heading, space = 0.15, 0.21, 0.1  # inches
    bars = sum(len(measure.cells) for measure in group.measures)
    height = bars * bar + len(group.measures) * (heading + space)
    margin_top, margin_bottom = 0.05, 0.3
    total = height + margin_top + margin_bottom
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, total))
        axes = figure.add_axes((0.05, margin_bottom / total, 0.84, height / total))
        axes.set_ylim(height, 0)
        y = 0.0
        for measure in group.measures:
            axes.text(-0.01, y + 0.7 * heading, _short(measure.name), va="baseline", weight="bold")
            y += heading
            for model in (model for model in marked if model in measure.cells):
                cell, at = measure.cells[model], y + bar / 2
                axes.barh(at, cell.rate, height=bar * 0.72, color=marked[model].colour, alpha=0.8, lw=0)
                axes.plot([cell.low, cell.high], [at, at], color=_INK, lw=1)
                axes.plot(-0.028, at, **_point(marked[model]), ms=4.2, clip_on=False)
                axes.text(1.02, at, cell.percent, va="center", size=8.5, color=_INK)
                y += bar
            y += space
        axes.set_xlim(0, 1)
        axes.set_yticks([])
        axes.grid(axis="y", visible=False)
        axes.xaxis.set_major_locator(FixedLocator([0, 0.25, 0.5, 0.75, 1]))
        axes.xaxis.set_major_formatter(PercentFormatter(1))
        axes.spines["left"].set_visible(False)
        parts = [
            f"{measure.name}: " + ", ".join(f"{model} {cell.percent}%" for model, cell in measure.cells.items())
            for measure in group.measures
        ]
        return _svg(figure, f"bars-{group.key}", f"Bars: {group.title} with 95% intervals. {'; '.join(parts)}.")


def trade_off(attacks: Mapping[str, Spread], refusals: Mapping[str, Spread], marked: Mapping[str, Mark]) -> str:
    """Over-refusal against attack success, a point per model that has both; lines reach to its lowest and highest."""
    shown = [model for model in marked if model in attacks and model in refusals]
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, 4.1), layout="constrained")
        axes = figure.add_subplot()
        axes.axhspan(TOO_MUCH, 1.04, color=SERIES[0], alpha=0.1, lw=0)
        axes.fill_between([-0.03, 0.25], -0.03, 0.25, color=SERIES[2], alpha=0.12, lw=0)
        for left, up, text, across in (
            (0.5, 0.95, "refuses most harmless prompts", "center"),
            (1.02, 0.12, "answers attacks", "right"),
            (0.27, 0.2, "safe and of use", "left"),
        ):
            axes.text(left, up, text, ha=across, color=_FAINT, style="italic", size=9)
        for model in shown:
            x, y, look = attacks[model], refusals[model], marked[model]
            axes.plot([x.lowest, x.highest], [y.mean, y.mean], color=look.colour, alpha=0.45, lw=1.2)
            axes.plot([x.mean, x.mean], [y.lowest, y.highest], color=look.colour, alpha=0.45, lw=1.2)
            axes.plot(x.mean, y.mean, **_point(look), ms=8, clip_on=False, zorder=3)
        axes.set_xlim(-0.03, 1.04)
        axes.xaxis.set_major_locator(FixedLocator([0, 0.25, 0.5, 0.75, 1]))
        axes.xaxis.set_major_formatter(PercentFormatter(1))
        axes.set_xlabel("attack success (less is better)")
        _share_axis(axes)
        axes.set_ylim(-0.03, 1.04)
        axes.set_ylabel("over-refusal (less is better)")
        points = "; ".join(
            f"{m}: attack success {attacks[m].percent}%, over-refusal {refusals[m].percent}%" for m in shown
        )
        return _svg(figure, "trade", f"Over-refusal against attack success, a point per model. {points}.")


def refusal_position_cdf(positions: Mapping[str, Mapping[str, Any]], marked: Mapping[str, Mark]) -> str:
    """Share of answers that have begun to refuse by a token, per model; it ends at the refused share.

    `positions` holds per model {"positions": [...], "n": answers}: the token at which each refusal begins,
    the first token of an answer being 1.
    """
    shown = {name: entry for name, entry in positions.items() if entry["n"]}
    last = max([30, *(p for entry in shown.values() for p in entry["positions"])])
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, 3.1), layout="constrained")
        axes = figure.add_subplot()
        for stagger, (name, entry) in enumerate(shown.items()):
            places, counts = np.unique(np.maximum(1, np.array(entry["positions"], int)), return_counts=True)
            refused = len(entry["positions"]) / entry["n"]
            xs = [0.9, *places.tolist(), last * 1.1]
            ys = [0.0, *(counts.cumsum() / entry["n"]).tolist(), refused]
            axes.plot(xs, ys, drawstyle="steps-post", **_line(marked[name], len(xs), stagger))
        for landmark in (5, 30):
            axes.axvline(landmark, color=_AXIS, linewidth=1, linestyle=(0, (2, 2)), zorder=0)
        axes.set_xscale("log")
        axes.set_xlim(0.9, last * 1.1)
        axes.xaxis.set_major_locator(FixedLocator([1, 2, 5, 10, 30, 100, 300, 1000, 3000, 10000]))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.0f}"))
        axes.set_xlabel("token of the answer (log scale)")
        _share_axis(axes)
        axes.set_ylabel("answers that have begun to refuse")
        ends = "; ".join(f"{name}: {len(entry['positions']) / entry['n']:.1%} refuse" for name, entry in shown.items())
        return _svg(figure, "cdf", f"Share of attacked answers that have begun to refuse by each token. {ends}.")


def refusal_curve(kind: str, panel: Mapping[str, Any], marked: Mapping[str, Mark]) -> str:
    """Mean p(refusal | question, answer so far) by position, with a quantile band, along one `kind` of answers.

    `panel` holds {model: {"mean", "low", "high"}}; item t of each list is a probability (0-1) after t tokens.
    """
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, 2.9), layout="constrained")
        axes = figure.add_subplot()
        _draw_curves(axes, panel, marked)
        axes.set_ylabel("p(refusal) for the next token")
        ends = "; ".join(
            f"{name}: from {curve['mean'][0]:.2f} to {curve['mean'][-1]:.2f}"
            for name, curve in panel.items()
            if curve["mean"]
        )
        return _svg(figure, f"curve-{kind}", f"Mean probability of a refusal by position in {kind} answers. {ends}.")


def refusal_curves(curves: Mapping[str, Mapping[str, Any]], marked: Mapping[str, Mark]) -> str:
    """`refusal_curve` for harmful and benign answers side by side and with a legend, to stand outside a report."""
    panels = {kind: curves[kind] for kind in ("harmful", "benign") if curves.get(kind)}
    names = list(dict.fromkeys(name for panel in panels.values() for name in panel))
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(10.6, 3.4), layout="constrained")
        row = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axes, (kind, panel) in zip(row, panels.items(), strict=True):
            _draw_curves(axes, panel, marked)
            axes.set_title(f"{kind} answers")
        row[0].set_ylabel("p(refusal) for the next token")
        handles = [Line2D([], [], **_line(marked[name], 1, 0)) for name in names]
        figure.legend(handles, names, loc="outside upper left", ncols=min(len(names), 5), columnspacing=1.6)
        return _svg(figure, "curves", "Mean probability of a refusal by position in the answer, per model")


def _draw_curves(axes: Axes, panel: Mapping[str, Any], marked: Mapping[str, Mark]) -> None:
    for stagger, (name, curve) in enumerate(panel.items()):
        ts = range(len(curve["mean"]))
        axes.fill_between(ts, curve["low"], curve["high"], color=marked[name].colour, alpha=0.13, lw=0)
        axes.plot(ts, curve["mean"], **_line(marked[name], len(ts), stagger))
    axes.set_xlabel("tokens of the answer so far")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7, steps=[1, 2, 5, 10]))
    axes.margins(x=0.01)
    _share_axis(axes)


def _point(mark: Mark) -> dict[str, Any]:
    return {"color": mark.colour, "marker": mark.marker, "linestyle": "none", "mew": 0}


def _line(mark: Mark, points: int, stagger: int) -> dict[str, Any]:
    """A line with a few marks on it; staggered, so that lines on top of each other all show."""
    step = max(1, points // 6)
    return {"color": mark.colour, "marker": mark.marker, "mew": 0, "markevery": (stagger % step, step)}


def _share_axis(axes: Axes) -> None:
    axes.set_ylim(-0.02, 1.02)
    axes.yaxis.set_major_locator(FixedLocator([0, 0.25, 0.5, 0.75, 1]))
    axes.yaxis.set_major_formatter(PercentFormatter(1))


def _short(name: str, limit: int = 52) -> str:
    return name if len(name) <= limit else name[: limit - 1] + "…"


def _css(colour: str) -> str:
    """A colour that a page may replace: `var(--series-0, #d55e00)`."""
    return f"var(--{_PAGE_COLOURS[colour]}, {colour})" if colour in _PAGE_COLOURS else colour


def _svg(figure: Figure, name: str, description: str) -> str:
    """The figure as one <svg> element whose ids are short and start with `name`; the same input gives the same text."""
    out = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context({"svg.hashsalt": name}), warnings.catch_warnings():
        # the text is drawn by who shows the figure, with fonts of theirs
        warnings.filterwarnings("ignore", message="Glyph .* missing from font", category=UserWarning)
        figure.savefig(out, format="svg", transparent=True, metadata=nothing)
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", svg, flags=re.DOTALL)  # it would style the page
    svg = re.sub(r"(?<=[a-z]: )#[0-9a-f]{6}\b", lambda colour: _css(colour[0]), svg)
    svg = _scoped(svg, name)
    label = f'role="img" aria-label="{escape(description)}" stroke-linejoin="round"'
    return svg.replace("<svg", f"<svg {label}", 1)


def _scoped(svg: str, name: str) -> str:
    """Ids that something refers to, numbered after `name`; the others left out."""
    numbers = count(1)
    used = dict.fromkeys(re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', svg))
    new = {old: f"{name}-{number}" for old, number in zip(("".join(pair) for pair in used), numbers, strict=False)}
    svg = re.sub(r' id="([^"]+)"', lambda found: f' id="{new[found[1]]}"' if found[1] in new else "", svg)
    svg = re.sub(r'href="#([^"]+)"', lambda found: f'href="#{new[found[1]]}"', svg)
    return re.sub(r"url\(#([^)]+)\)", lambda found: f"url(#{new[found[1]]})", svg)
