"""From results to what people read: `results.json`, a terminal table, Markdown and one HTML file.

`results` has the schema of `results.json`; all of its rates are 0-1 and are shown in percent.
"""

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from derta_jax.evaluation.files import write_whole
from derta_jax.evaluation.reporting.page import render_page
from derta_jax.evaluation.reporting.rates import Measure, Results, headline


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
            cells = [_terminal_cell(measure, model) for model in results["models"]]
            table.add_row(Text(f"  {measure.name}"), measure.n, *cells)
    return table


def _caption(results: Results) -> str:
    judge = results["judge"]
    return f"%, Wilson 95% interval in brackets; judge: {judge['name']} {judge['version']}"


def _terminal_cell(measure: Measure, model: str) -> Text:
    cell = measure.cells.get(model)
    if cell is None:
        text = Text("–", style="dim")
    else:
        text = Text.assemble((cell.percent, "bold green" if cell.best else ""), (f" ({cell.interval})", "dim"))
    return text.append(_unjudged(measure, model), style="yellow")


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
            cells = [_markdown_cell(measure, model) for model in models]
            lines.append(_markdown_row([_markdown_text(measure.name), measure.n, *cells]))
    return "\n".join([*lines, "", _markdown_text(_caption(results)), ""])


def _markdown_cell(measure: Measure, model: str) -> str:
    cell = measure.cells.get(model)
    if cell is None:
        text = "–"
    else:
        text = f"**{cell.percent}** ({cell.interval})" if cell.best else f"{cell.percent} ({cell.interval})"
    return text + _unjudged(measure, model)


def _unjudged(measure: Measure, model: str) -> str:
    count = measure.unjudged.get(model)
    return f" {count} unjudged" if count else ""


def _markdown_row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _markdown_text(text: str) -> str:
    """Names are names, not markup."""
    for sign in "\\|*_`<[":
        text = text.replace(sign, f"\\{sign}")
    return text


def write_results(results: Results, path: str | os.PathLike[str]) -> None:
    """`results.json`: all of it or none of it; NaN, which is not JSON, is an error."""
    write_whole(json.dumps(results, indent=2, ensure_ascii=False, allow_nan=False) + "\n", path)


def render_report(results: Results, details: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """One HTML file that needs nothing else. A section without data is left out.

    An entry of `results` may say how many answers have no verdict, `unjudged`; they are not in its `n`.
    `results["comparisons"]`, optional, paired by question: [{"a", "b", "group", "name", "n", "only_a", "only_b",
    "difference", "low", "high", "p"}]; only_a counts where only a is bad, difference is rate a - rate b.

    `details`, every key optional:
        title, summary: plain text
        refusal_positions: {model: {"positions": [token at which each refusal begins, from 1], "n": answers}}
        curves: {"harmful" | "benign": {model: {"mean", "low", "high"}}}, lists of p(refusal) by position
        examples: [{"title", "prompt", "prefill", "answers": {model: {"tokens", "p_refusal", "verdict"}}}];
            tokens join to the answer, p_refusal[t] is the probability of a refusal in place of token t,
            verdict is "unsafe", "safe", "refused" or None
        answers: {model: [{"id", "group", "name", "prompt", "prefill", "response", "verdict", "refused_at"}]}
        provenance: {name: value}, values may be lists and mappings
    """
    write_whole(render_page(results, details), path)
