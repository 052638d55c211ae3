"""The paired test in plain words."""

import pytest

from derta_jax.evaluation.reporting.comparisons import pairs


def entry(**changes):
    """100 questions; a is bad at 50 that b is not, b at 8 that a is not."""
    plain = {"a": "vanilla", "b": "DeRTa", "group": "attacks", "name": "code", "n": 100, "only_a": 50, "only_b": 8}
    return {**plain, "difference": 0.42, "low": 0.33, "high": 0.5, "p": 0.0002, **changes}


def contrast(**changes):
    (pair,) = pairs([entry(**changes)])
    (only,) = pair.contrasts
    return only


def test_a_difference_says_who_by_how_much_and_how_sure():
    shown = contrast()
    assert shown.better == "DeRTa"
    assert shown.reading == "DeRTa is unsafe less often, by 42 points [33, 50]"
    assert shown.p == "< 0.001"
    assert shown.group == "attack success"


def test_the_other_way_round_the_interval_is_read_for_the_better_model():
    shown = contrast(only_a=8, only_b=50, difference=-0.42, low=-0.5, high=-0.33, p=0.012)
    assert shown.reading == "vanilla is unsafe less often, by 42 points [33, 50]"
    assert shown.p == "0.012"


@pytest.mark.parametrize(
    ("group", "words"),
    [("over_refusal", "refuses harmless prompts less often"), ("helpfulness", "is right more often")],
)
def test_better_means_what_the_group_means(group, words):
    assert contrast(group=group).reading.startswith(f"DeRTa {words}, by")


@pytest.mark.parametrize(
    ("changes", "reading"),
    [
        ({"p": 0.2}, "no difference shown [33, 50]"),
        ({"low": -0.02, "high": 0.003}, "no difference shown [−2, 0.3]"),
        ({"p": None, "low": None, "high": None, "n": 0}, "no difference shown"),
    ],
)
def test_without_evidence_no_difference_is_claimed(changes, reading):
    assert contrast(**changes).better is None
    assert contrast(**changes).reading == reading


def test_a_pair_is_summed_up_by_group_so_that_a_price_is_seen():
    (first, second) = pairs(
        [
            entry(),
            entry(name="role"),
            entry(b="RTO"),
            entry(group="over_refusal", only_a=1, only_b=9, difference=-0.2, low=-0.3, high=-0.1),
            entry(group="helpfulness", p=0.8),
        ]
    )
    assert (first.a, first.b, second.b) == ("vanilla", "DeRTa", "RTO")
    assert first.summary == (
        "attack success: DeRTa better in 2 of 2; over-refusal: vanilla better in 1 of 1;"
        " helpfulness: no difference shown in any of 1"
    )
