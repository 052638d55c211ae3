"""The report's figures, as SVG text to put inside a page.

Each function takes plain numbers, and colours from `palette`, so that a method looks the same everywhere.
The text stays text. Ids carry the figure's name, so that several figures can share a page.
"""

import io
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator, PercentFormatter

# Okabe & Ito 2008 for any colour vision, without black and yellow and with Paul Tol's darker purple.
_COLOURS = ("#D55E00", "#0072B2", "#009E73", "#AA3377", "#E69F00", "#56B4E9", "#5A5A5A")
_DASHES = ("-", (0, (5, 1.5)), (0, (5, 1.5, 1, 1.5)), (0, (2, 1)))
_MARKERS = "osD^vPX"

_INK = "#23272e"
_FAINT = "#5c6370"
_GRID = "#e1e4e8"
_WIDTH = 10.6  # inches
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": "#b6bcc5",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10.5,
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
    "legend.fontsize": 10,
    "legend.handlelength": 2.2,
    "lines.linewidth": 1.9,
}


def palette(names: Iterable[str]) -> dict[str, str]:
    """A colour per name, in order of first appearance."""
    return {name: _COLOURS[i % len(_COLOURS)] for i, name in enumerate(dict.fromkeys(names))}


def attack_success(models: Mapping[str, Any], colours: Mapping[str, str]) -> str:
    """Dots with Wilson intervals: a row per attack, a dot per model. `models` as in results.json."""
    attacks = list(dict.fromkeys(a for m in models.values() for a in m.get("attacks", {})))
    names = [name for name, m in models.items() if m.get("attacks")]
    row = 0.14 * len(names) + 0.18  # inches
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, row * len(attacks) + 0.95), layout="constrained")
        axes = figure.add_subplot()
        for i, name in enumerate(names):
            offset = ((len(names) - 1) / 2 - i) * 0.14 / row
            for y, attack in enumerate(attacks):
                entry = models[name]["attacks"].get(attack)
                if entry is None or entry["asr"] is None:
                    continue
                at = y - offset
                axes.plot([entry["low"], entry["high"]], [at, at], color=colours[name], alpha=0.45)
                axes.plot(entry["asr"], at, **_marker(name, colours), clip_on=False, zorder=3)
        for y in range(1, len(attacks)):
            axes.axhline(y - 0.5, color=_GRID, linewidth=0.8)
        axes.set_ylim(len(attacks) - 0.5, -0.5)
        axes.set_yticks(range(len(attacks)), attacks, color=_INK)
        axes.grid(axis="y", visible=False)
        axes.set_xlim(-0.01, 1.01)
        axes.xaxis.set_major_formatter(PercentFormatter(1))
        axes.set_xlabel("attack success rate")
        axes.spines["left"].set_visible(False)
        _legend(figure, [Line2D([], [], **_marker(name, colours), label=name) for name in names])
        return _svg(figure, "asr", "Attack success rate with 95% intervals, per attack and model")


def refusal_position_cdf(positions: Mapping[str, Mapping[str, Any]], colours: Mapping[str, str]) -> str:
    """Share of answers that have begun to refuse by a token, per model; it ends at the refused share.

    `positions` holds per model {"positions": [...], "n": answers}: the token at which each refusal begins,
    the first token of an answer being 1.
    """
    shown = {name: entry for name, entry in positions.items() if entry["n"]}
    last = max([30, *(p for entry in shown.values() for p in entry["positions"])])
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, 3.4), layout="constrained")
        axes = figure.add_subplot()
        lines = []
        for name, entry in shown.items():
            reached = sorted(max(1, p) for p in entry["positions"])
            refused = len(reached) / entry["n"]
            xs = [0.9, *reached, last * 1.1]
            ys = [0.0, *((i + 1) / entry["n"] for i in range(len(reached))), refused]
            label = f"{name} ({refused:.1%} refuse)"
            lines += axes.plot(xs, ys, drawstyle="steps-post", label=label, **_line(name, colours))
        for landmark in (5, 30):
            axes.axvline(landmark, color="#b6bcc5", linewidth=1, linestyle=(0, (2, 2)), zorder=0)
        axes.set_xscale("log")
        axes.set_xlim(0.9, last * 1.1)
        axes.xaxis.set_major_locator(FixedLocator([1, 2, 5, 10, 30, 100, 300, 1000, 3000, 10000]))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.0f}"))
        axes.set_xlabel("token of the answer (log scale)")
        _share_axis(axes)
        axes.set_ylabel("answers that have begun to refuse")
        _legend(figure, lines)
        return _svg(figure, "cdf", "Share of answers that have begun to refuse by each token, per model")


def refusal_curves(curves: Mapping[str, Mapping[str, Any]], colours: Mapping[str, str]) -> str:
    """Mean p(refusal | question, answer so far) by position with a quantile band; a panel per kind of answer.

    `curves` holds {model: {"mean", "low", "high"}} for "harmful" and "benign" answers; item t of each list is
    a probability (0-1) after t tokens of the answer.
    """
    panels = {kind: curves[kind] for kind in ("harmful", "benign") if curves.get(kind)}
    names = list(dict.fromkeys(name for panel in panels.values() for name in panel))
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, 3.4), layout="constrained")
        row = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axes, (kind, panel) in zip(row, panels.items(), strict=True):
            for name, curve in panel.items():
                ts = range(len(curve["mean"]))
                axes.fill_between(ts, curve["low"], curve["high"], color=colours[name], alpha=0.15, lw=0)
                axes.plot(ts, curve["mean"], **_line(name, colours))
            axes.set_title(f"{kind} answers")
            axes.set_xlabel("tokens of the answer so far")
            axes.margins(x=0.01)
            _share_axis(axes)
        row[0].set_ylabel("p(refusal) for the next token")
        _legend(figure, [Line2D([], [], label=name, **_line(name, colours)) for name in names])
        return _svg(figure, "curves", "Mean probability of a refusal by position in the answer, per model")


def _line(name: str, colours: Mapping[str, str]) -> dict[str, Any]:
    """Colour and dash, so that lines on top of each other both show."""
    return {"color": colours[name], "linestyle": _DASHES[list(colours).index(name) % len(_DASHES)]}


def _marker(name: str, colours: Mapping[str, str]) -> dict[str, Any]:
    """Colour and shape of a dot."""
    shape = _MARKERS[list(colours).index(name) % len(_MARKERS)]
    return {"color": colours[name], "marker": shape, "markersize": 6, "linestyle": "none", "mew": 0}


def _share_axis(axes: Axes) -> None:
    axes.set_ylim(-0.02, 1.02)
    axes.yaxis.set_major_locator(FixedLocator([0, 0.25, 0.5, 0.75, 1]))
    axes.yaxis.set_major_formatter(PercentFormatter(1))


def _legend(figure: Figure, handles: Sequence[Line2D]) -> None:
    """One row above the plot, as far as it goes."""
    labels = [str(handle.get_label()) for handle in handles]
    figure.legend(handles, labels, loc="outside upper left", ncols=min(len(handles), 5), columnspacing=1.6)


def _svg(figure: Figure, name: str, description: str) -> str:
    """The figure as one <svg> element whose ids start with `name`; the same input gives the same text."""
    out = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(out, format="svg", transparent=True, metadata=nothing)
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", svg, flags=re.DOTALL)  # it would style the page
    svg = re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    label = f'role="img" aria-label="{escape(description)}" stroke-linejoin="round"'
    return svg.replace("<svg", f"<svg {label}", 1)
