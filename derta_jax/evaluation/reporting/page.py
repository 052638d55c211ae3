"""The report's page: one HTML file with its style, its script, its figures and its answers inside."""

import base64
import hashlib
import json
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

import jinja2
from markupsafe import Markup

from derta_jax.evaluation import published
from derta_jax.evaluation.reporting import figures
from derta_jax.evaluation.reporting.answers import pack
from derta_jax.evaluation.reporting.comparisons import pairs
from derta_jax.evaluation.reporting.findings import spread, warnings
from derta_jax.evaluation.reporting.rates import Group, Results, headline
from derta_jax.evaluation.statistics import wilson


def render_page(results: Results, details: Mapping[str, Any]) -> str:
    """The HTML for `results` and `details` (see `report.render_report`); a section without data is left out."""
    groups = headline(results)
    positions = {m: entry for m, entry in details.get("refusal_positions", {}).items() if entry["n"]}
    curves = {kind: panel for kind in ("harmful", "benign") if (panel := details.get("curves", {}).get(kind))}
    examples = [_example(example) for example in details.get("examples", [])]
    answers = {model: rows for model, rows in details.get("answers", {}).items() if rows}
    contrasts = pairs(results.get("comparisons", ()))
    named = [
        results["models"],
        positions,
        *curves.values(),
        *(example["answers"] for example in examples),
        answers,
        *((pair.a, pair.b) for pair in contrasts),
    ]
    marked = figures.marks(model for models in named for model in models)
    means = {group.key: spread(groups, group.key) for group in groups}
    script = _resource("page.js")
    return _template().render(
        title=details.get("title") or "Evaluation",
        summary=details.get("summary"),
        judge=results["judge"],
        models=list(results["models"]),
        groups=groups,
        means=means,
        warnings=warnings(groups),
        marked=marked,
        **_paper(groups),
        bars=[
            (group, Markup(figures.rate_bars(group, marked)))
            for group in groups
            if any(measure.cells for measure in group.measures)
        ],
        trade_off=_trade_off(means, marked),
        pairs=contrasts,
        positions=list(positions),
        cdf_figure=Markup(figures.refusal_position_cdf(positions, marked)) if positions else None,
        placed={m: p["refusal_position"] for m, p in results["models"].items() if p.get("refusal_position")},
        curve_figures=[
            (kind, list(panel), Markup(figures.refusal_curve(kind, panel, marked))) for kind, panel in curves.items()
        ],
        examples=examples,
        answers=Markup(pack(answers)) if answers else None,
        answer_count=sum(map(len, answers.values())),
        marks_json=Markup(_json({m: {"glyph": mark.glyph, "colour": mark.css} for m, mark in marked.items()})),
        provenance=_provenance(results["judge"], details.get("provenance") or {}),
        style=Markup(_resource("page.css")),
        script=Markup(script),
        script_hash="sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def _trade_off(means: Mapping[str, Mapping[str, Any]], marked: Mapping[str, figures.Mark]) -> Markup | None:
    attacks, refusals = means.get("attacks", {}), means.get("over_refusal", {})
    return Markup(figures.trade_off(attacks, refusals, marked)) if attacks.keys() & refusals.keys() else None


def _paper(groups: list[Group]) -> dict[str, Any]:
    """The paper's columns for the table, where one of its measures was measured, and its own table."""
    names = {
        (group.key, measure.name): name
        for group in groups
        for measure in group.measures
        if (name := published.measure_of(group.key, measure.name))
    }
    shown = [
        model for model in published.MODELS if model.model == published.SHOWN and model.method in ("vanilla", "DeRTa")
    ]
    return {
        "paper": published.PAPER,
        "xstest_safe": published.XSTEST_SAFE,
        "paper_names": names,
        "paper_columns": shown if names else [],
        "paper_measures": list(published.MEASURES),
        "published": [
            {
                "model": model.model,
                "method": model.method,
                "rates": model.rates,
                "interval": _interval(model.refused, published.XSTEST_SAFE) if model.refused is not None else None,
            }
            for model in published.MODELS
        ],
    }


def _interval(successes: int, n: int) -> str:
    low, high = wilson(successes, n)
    return f"{100 * low:.0f}–{100 * high:.0f}"


def _example(example: Mapping[str, Any]) -> dict[str, Any]:
    """The example with each answer's tokens and probabilities paired."""
    answers = {}
    for model, answer in example["answers"].items():
        tokens, p_refusal = answer["tokens"], answer["p_refusal"]
        if len(tokens) != len(p_refusal):
            where = f"example {example['title']!r}, {model}"
            raise ValueError(f"{where}: {len(tokens)} tokens but {len(p_refusal)} values of p_refusal")
        pairs_of_tokens = list(zip(tokens, map(float, p_refusal), strict=True))
        answers[model] = {"verdict": answer["verdict"] or "unjudged", "tokens": pairs_of_tokens}
    return {**example, "answers": answers}


def _provenance(judge: Mapping[str, Any], provenance: Mapping[str, Any]) -> dict[str, str]:
    """As text; what else is known of the judge first."""
    more = {f"judge, {key}": value for key, value in judge.items() if key not in ("name", "version")}
    return {str(key): _text(value) for key, value in {**more, **provenance}.items()}


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return "\n".join(f"{key}: {_text(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_text, value))
    return "–" if value is None else str(value)


def _json(value: Any) -> str:
    """JSON that is safe between script tags."""
    return json.dumps(value, ensure_ascii=False).replace("<", "\\u003c")


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(_resource("page.html.j2"))


def _resource(name: str) -> str:
    return files("derta_jax.evaluation.reporting").joinpath(name).read_text(encoding="utf-8")
