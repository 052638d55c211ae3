"""The figures: one mark per model, text left as text, ids and colours that a page can share and replace."""

import re
from xml.etree import ElementTree

import pytest

from derta_jax.evaluation.reporting import figures
from derta_jax.evaluation.reporting.findings import Spread
from derta_jax.evaluation.reporting.rates import headline
from derta_jax.evaluation.statistics import attack_entry


def attacks(models):
    """The group of attacks of {model: {attack: unsafe of 100}}."""
    entries = {m: {"attacks": {a: attack_entry(k, 100) for a, k in its.items()}} for m, its in models.items()}
    (group,) = headline({"models": entries})
    return group


def curve(level):
    return {"mean": [level] * 8, "low": [level / 2] * 8, "high": [(1 + level) / 2] * 8}


def every_figure(names):
    marked = figures.marks(names)
    positions = {name: {"positions": [2, 2, 40], "n": 4} for name in names}
    curves = {"harmful": {name: curve(0.3) for name in names}}
    spreads = {name: Spread(0.2, 0.1, 0.4, 3) for name in names}
    return {
        "bars": figures.rate_bars(attacks({name: {"code": 7, "role": 0} for name in names}), marked),
        "trade-off": figures.trade_off(spreads, spreads, marked),
        "cdf": figures.refusal_position_cdf(positions, marked),
        "curve": figures.refusal_curve("harmful", curves["harmful"], marked),
        "curves": figures.refusal_curves(curves, marked),
    }


@pytest.mark.parametrize("name", ["bars", "trade-off", "cdf", "curve", "curves"])
def test_every_model_shows_in_its_own_colour_which_a_page_may_replace(name):
    svg = every_figure(["vanilla", "derta"])[name]
    ElementTree.fromstring(svg)
    for series, colour in enumerate(figures.SERIES[:2]):
        assert f"var(--series-{series}, {colour})" in svg
    assert figures.SERIES[2] not in svg.replace(f"var(--series-2, {figures.SERIES[2]})", "")
    assert not re.search(r"(?:fill|stroke): #", svg.replace("#000000", ""))


@pytest.mark.parametrize("name", ["bars", "trade-off", "cdf", "curve", "curves"])
def test_figures_are_reproducible_and_say_what_they_show(name):
    svg, again = (every_figure(["vanilla", "derta"])[name] for _ in range(2))
    assert svg == again
    assert svg.startswith('<svg role="img" aria-label="')
    assert svg.endswith("</svg>")
    assert "<text" in svg


def test_marks_differ_in_colour_or_shape_for_any_number_of_models():
    marked = figures.marks([f"model {i % 49}" for i in range(98)])
    assert len({(mark.colour, mark.marker) for mark in marked.values()}) == len(marked) == 49
    assert len({mark.glyph for mark in list(marked.values())[:7]}) == 7


def test_only_ids_that_something_refers_to_are_kept():
    for svg in every_figure(["a", "b"]).values():
        ids = re.findall(r' id="([^"]+)"', svg)
        used = re.findall(r'href="#([^"]+)"', svg) + re.findall(r"url\(#([^)]+)\)", svg)
        assert len(ids) == len(set(ids))
        assert set(ids) == set(used)


def test_bars_are_described_for_who_cannot_see_them():
    svg = figures.rate_bars(
        attacks({"vanilla": {"code": 91}, "<derta>": {"code": 0}}), figures.marks(["vanilla", "<derta>"])
    )
    assert "code: vanilla 91.0%, &lt;derta&gt; 0.0%" in svg
    assert ">91.0</text>" in svg


def test_the_cdf_ends_at_the_refused_share():
    svg = figures.refusal_position_cdf({"derta": {"positions": [1, 4, 200], "n": 4}}, figures.marks(["derta"]))
    assert "derta: 75.0% refuse" in svg


def test_a_model_that_never_refuses_has_a_line_all_the_same():
    svg = figures.refusal_position_cdf({"base": {"positions": [], "n": 4}}, figures.marks(["base"]))
    assert "base: 0.0% refuse" in svg


@pytest.mark.parametrize("name", ["a$_b$c", "$x^", "הזרקה 🧪", "模型", "a & b < c"])
def test_names_are_not_formulas_and_may_be_in_any_script(name):
    svg = figures.rate_bars(attacks({"m": {name: 1}}), figures.marks(["m"]))
    texts = [text.text for text in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]
    assert name in texts


def test_a_name_too_long_for_the_figure_is_cut():
    svg = figures.rate_bars(attacks({"m": {"x" * 80: 1}}), figures.marks(["m"]))
    assert f">{'x' * 51}…</text>" in svg
