"""From results to what people read: `results.json`, a terminal table, Markdown and one HTML file.

`results` has the schema of `results.json`; all of its rates are 0-1 and are shown in percent.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from rich import box
from rich.table import Table
from rich.text import Text

from derta_jax.evaluation import figures

Results = Mapping[str, Any]


@dataclass(frozen=True)
class Cell:
    """A rate with its 95% interval, all 0-1. `best`: no other model does better, and some do worse."""

    rate: float
    low: float
    high: float
    n: int
    best: bool

    @property
    def percent(self) -> str:
        return f"{100 * self.rate:.1f}"

    @property
    def interval(self) -> str:
        return f"{100 * self.low:.0f}–{100 * self.high:.0f}"


@dataclass(frozen=True)
class Measure:
    """One attack, task or set of prompts; a model that was not measured has no cell."""

    name: str
    cells: Mapping[str, Cell]

    @property
    def n(self) -> str:
        sizes = sorted({cell.n for cell in self.cells.values()})
        return "–".join(str(size) for size in dict.fromkeys((sizes[0], sizes[-1]))) if sizes else "0"


@dataclass(frozen=True)
class Group:
    """Measures that are read the same way."""

    title: str
    better: str
    measures: Sequence[Measure]


# The groups of results.json: key, name of the rate, title, which end is better.
_GROUPS = (
    ("attacks", "asr", "attack success", "lower"),
    ("helpfulness", "score", "helpfulness", "higher"),
    ("over_refusal", "rate", "over-refusal", "lower"),
)


def headline(results: Results) -> list[Group]:
    """Every rate of `results`, by group and measure, in order of first appearance; empty groups left out."""
    groups = []
    for key, rate, title, better in _GROUPS:
        entries = {model: parts.get(key, {}) for model, parts in results["models"].items()}
        names = dict.fromkeys(name for measured in entries.values() for name in measured)
        measures = [
            _measure(name, {m: e[name] for m, e in entries.items() if name in e}, rate, better) for name in names
        ]
        if measures:
            groups.append(Group(title, better, measures))
    return groups


def _measure(name: str, entries: Mapping[str, Mapping[str, Any]], rate: str, better: str) -> Measure:
    entries = {model: entry for model, entry in entries.items() if entry[rate] is not None}
    rates = [entry[rate] for entry in entries.values()]
    best = (min if better == "lower" else max)(rates, default=None)
    differ = len(set(rates)) > 1
    cells = {
        model: Cell(entry[rate], entry["low"], entry["high"], entry["n"], best=differ and entry[rate] == best)
        for model, entry in entries.items()
    }
    return Measure(name, cells)


def results_table(results: Results) -> Table:
    """For the terminal: a row per measure, a column per model; an arrow points to the better end."""
    table = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
        caption=Text(_caption(results), style="dim"),
        caption_justify="left",
    )
    table.add_column("", no_wrap=True)
    table.add_column("n", justify="right", style="dim")
    for model in results["models"]:
        table.add_column(Text(model), justify="right", min_width=len("(96–100)"))
    for group in headline(results):
        table.add_section()
        table.add_row(Text.assemble((group.title, "bold"), f" {'↓' if group.better == 'lower' else '↑'}"))
        for measure in group.measures:
            cells = [_terminal_cell(measure.cells.get(model)) for model in results["models"]]
            table.add_row(Text(f"  {measure.name}"), measure.n, *cells)
    return table


def _caption(results: Results) -> str:
    judge = results["judge"]
    return f"%, Wilson 95% interval in brackets; judge: {judge['name']} {judge['version']}"


def _terminal_cell(cell: Cell | None) -> Text:
    if cell is None:
        return Text("–", style="dim")
    return Text.assemble((cell.percent, "bold green" if cell.best else ""), (f" ({cell.interval})", "dim"))


def results_markdown(results: Results) -> str:
    """The terminal's table for a README: same rows, same numbers, the best of a row in bold."""
    models = list(results["models"])
    lines = [
        _markdown_row(["", "n", *map(_markdown_text, models)]),
        _markdown_row(["---", "---:", *["---:"] * len(models)]),
    ]
    for group in headline(results):
        heading = f"**{group.title}** ({group.better} is better)"
        lines.append(_markdown_row([heading, "", *[""] * len(models)]))
        for measure in group.measures:
            cells = [_markdown_cell(measure.cells.get(model)) for model in models]
            lines.append(_markdown_row([_markdown_text(measure.name), measure.n, *cells]))
    return "\n".join([*lines, "", _markdown_text(_caption(results)), ""])


def _markdown_cell(cell: Cell | None) -> str:
    if cell is None:
        return "–"
    return f"**{cell.percent}** ({cell.interval})" if cell.best else f"{cell.percent} ({cell.interval})"


def _markdown_row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _markdown_text(text: str) -> str:
    """Names are names, not markup."""
    for sign in "\\|*_`<[":
        text = text.replace(sign, f"\\{sign}")
    return text


def write_results(results: Results, path: str | os.PathLike[str]) -> None:
    """`results.json`: all of it or none of it; NaN, which is not JSON, is an error."""
    _write(Path(path), json.dumps(results, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def render_report(results: Results, details: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """One HTML file that needs nothing else. A section without data is left out.

    `details`, every key optional:
        title, summary: plain text
        refusal_positions: {model: {"positions": [token at which each refusal begins, from 1], "n": answers}}
        curves: {"harmful" | "benign": {model: {"mean", "low", "high"}}}, lists of p(refusal) by position
        examples: [{"title", "prompt", "prefill", "answers": {model: {"tokens", "p_refusal", "verdict"}}}];
            tokens join to the answer, p_refusal[t] is the probability of a refusal in place of token t,
            verdict is "unsafe", "safe" or "refused"
        provenance: {name: value}
    """
    positions = {m: entry for m, entry in details.get("refusal_positions", {}).items() if entry["n"]}
    curves = {kind: panel for kind, panel in details.get("curves", {}).items() if panel}
    examples = [_example(example) for example in details.get("examples", [])]
    named = [results["models"], positions, *curves.values(), *(example["answers"] for example in examples)]
    colours = figures.palette(model for models in named for model in models)
    attacked = any(parts.get("attacks") for parts in results["models"].values())
    page = _template().render(
        title=details.get("title") or "Evaluation",
        summary=details.get("summary"),
        judge=results["judge"],
        models=list(results["models"]),
        groups=headline(results),
        colours=colours,
        attack_figure=Markup(figures.attack_success(results["models"], colours)) if attacked else None,
        cdf_figure=Markup(figures.refusal_position_cdf(positions, colours)) if positions else None,
        placed={m: p["refusal_position"] for m, p in results["models"].items() if p.get("refusal_position")},
        curves_figure=Markup(figures.refusal_curves(curves, colours)) if curves else None,
        examples=examples,
        provenance=details.get("provenance"),
    )
    _write(Path(path), page)


def _example(example: Mapping[str, Any]) -> dict[str, Any]:
    """The example with each answer's tokens and probabilities paired."""
    answers = {}
    for model, answer in example["answers"].items():
        tokens, p_refusal = answer["tokens"], answer["p_refusal"]
        if len(tokens) != len(p_refusal):
            where = f"example {example['title']!r}, {model}"
            raise ValueError(f"{where}: {len(tokens)} tokens but {len(p_refusal)} values of p_refusal")
        pairs = list(zip(tokens, map(float, p_refusal), strict=True))
        answers[model] = {"verdict": answer["verdict"], "tokens": pairs}
    return {**example, "answers": answers}


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    source = files("derta_jax.evaluation").joinpath("report.html.j2").read_text(encoding="utf-8")
    return environment.from_string(source)


def _write(path: Path, text: str) -> None:
    """Whoever reads `path` sees the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
