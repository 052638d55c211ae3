"""The paper's figures: whole, and found under the names that attacks go by."""

import pytest

from derta_jax.evaluation.published import MEASURES, MODELS, SHOWN, XSTEST_SAFE, measure_of
from derta_jax.evaluation.statistics import wilson

PUBLISHED = {(model.model, model.method): model for model in MODELS}


def test_rates_are_shares_under_known_names():
    assert len(PUBLISHED) == len(MODELS) == 13
    for model in MODELS:
        assert set(model.rates) <= set(MEASURES)
        assert all(0 <= rate <= 1 for rate in model.rates.values())


def test_the_models_that_are_shown_have_every_figure():
    for method in ("vanilla", "DeRTa"):
        assert set(PUBLISHED[SHOWN, method].rates) == set(MEASURES)


def test_some_figures_are_the_published_ones():
    assert PUBLISHED["LLaMA3-70B", "DeRTa"].rates["Code"] == pytest.approx(0.215)
    assert PUBLISHED["LLaMA3-8B", "vanilla"].rates["CompletingAttack"] == pytest.approx(0.93)
    assert PUBLISHED["Mistral-7B", "DeRTa"].rates["AlpacaEval"] == pytest.approx(0.787)
    assert "Code" not in PUBLISHED["LLaMA3-8B", "DeRTa"].rates


@pytest.mark.parametrize(
    ("model", "method", "percent", "low", "high"),
    [
        ("LLaMA3-8B", "vanilla", 27.6, 22, 33),
        ("LLaMA3-8B", "DeRTa", 44.4, 38, 51),
        ("LLaMA3-70B", "vanilla", 19.2, 15, 25),
        ("LLaMA3-70B", "DeRTa", 64.4, 58, 70),
    ],
)
def test_over_refusal_of_the_released_outputs(model, method, percent, low, high):
    entry = PUBLISHED[model, method]
    assert entry.refused is not None
    assert 100 * entry.rates["XSTest"] == pytest.approx(percent)
    assert [round(100 * end) for end in wilson(entry.refused, XSTEST_SAFE)] == [low, high]


@pytest.mark.parametrize(
    ("group", "name", "measure"),
    [
        ("attacks", "code", "Code"),
        ("attacks", "jailbreak-chat", "JailbreakChat"),
        ("attacks", "Completing", "CompletingAttack"),
        ("helpfulness", "gsm8k", "GSM8K"),
        ("over_refusal", "XSTest safe", "XSTest"),
        ("helpfulness", "code", None),
        ("attacks", "codes", None),
        ("attacks", "", None),
    ],
)
def test_measures_are_found_by_their_names(group, name, measure):
    assert measure_of(group, name) == measure
