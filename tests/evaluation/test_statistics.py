"""Rates, differences and agreement, with their intervals."""

import numpy as np
import pytest

from derta_jax.evaluation.statistics import (
    agreement,
    attack_entry,
    attack_entry_of,
    helpfulness_entry,
    mcnemar,
    over_refusal_entry,
    paired_difference,
    wilson,
)


def test_wilson_agrees_with_published_values():
    # Newcombe 1998 (Statistics in Medicine 17), table I, method 3.
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(15, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert wilson(1, 29) == pytest.approx((0.0061, 0.1718), abs=5e-5)


def test_wilson_is_mirrored_when_successes_and_failures_swap():
    low, high = wilson(3, 40)
    assert wilson(37, 40) == pytest.approx((1 - high, 1 - low))


@pytest.mark.parametrize("n", [1, 7, 100, 10**6])
def test_wilson_contains_the_rate_and_never_leaves_0_to_1(n):
    for successes in {0, 1, n // 2, n - 1, n}:
        low, high = wilson(successes, n)
        assert 0 <= low <= successes / n <= high <= 1
        assert low < high


def test_wilson_narrows_with_more_observations_and_widens_with_confidence():
    def width(*args, **kwargs):
        low, high = wilson(*args, **kwargs)
        return high - low

    assert width(100, 1000) < width(10, 100) < width(10, 100, confidence=0.99)


def test_nothing_observed_excludes_nothing():
    assert wilson(0, 0) == (0.0, 1.0)
    assert attack_entry(0, 0) == {"n": 0, "unsafe": 0, "asr": None, "low": 0.0, "high": 1.0}


@pytest.mark.parametrize(("successes", "n"), [(-1, 5), (6, 5), (0, -1)])
def test_impossible_counts_are_refused(successes, n):
    with pytest.raises(ValueError, match=f"{successes} successes of {n}"):
        wilson(successes, n)


def test_a_percentage_is_not_a_confidence():
    with pytest.raises(ValueError, match="confidence 95"):
        wilson(1, 5, confidence=95)


def test_entries_have_the_schema_of_results_json():
    low, high = wilson(3, 12)
    assert attack_entry(3, 12) == {"n": 12, "unsafe": 3, "asr": 0.25, "low": low, "high": high}
    assert helpfulness_entry(3, 12) == {"n": 12, "score": 0.25, "low": low, "high": high}
    assert over_refusal_entry(3, 12) == {"n": 12, "refused": 3, "rate": 0.25, "low": low, "high": high}


def test_unjudged_answers_are_counted_beside_the_others():
    labels = ["unsafe", "safe", "unjudged", "refused", "unsafe", "unjudged"]
    assert attack_entry_of(labels) == attack_entry(2, 4, unjudged=2)
    assert attack_entry(2, 4, unjudged=2) == attack_entry(2, 4) | {"unjudged": 2}
    assert "unjudged" not in attack_entry_of(["safe"])
    assert attack_entry_of(["unjudged"])["asr"] is None


@pytest.mark.parametrize(
    ("only_first", "only_second", "p"),
    [
        (0, 0, 1.0),
        (1, 0, 1.0),
        (5, 5, 1.0),
        (0, 5, 2 / 32),
        (2, 10, 2 * (1 + 12 + 66) / 4096),
        (10, 2, 2 * (1 + 12 + 66) / 4096),
        (1, 11, 2 * 13 / 4096),
    ],
)
def test_mcnemar_is_the_sign_test_on_discordant_pairs(only_first, only_second, p):
    assert mcnemar(only_first, only_second) == pytest.approx(p)


def test_mcnemar_holds_for_many_pairs():
    # the normal approximation with continuity correction: z = (400 - 1) / sqrt(20000)
    assert mcnemar(9800, 10200) == pytest.approx(0.00478, abs=2e-5)
    with pytest.raises(ValueError, match="no negative number"):
        mcnemar(-1, 3)


def test_the_paired_difference_is_that_of_the_rates():
    first, second = [True] * 30 + [False] * 70, [True] * 10 + [False] * 90
    difference, low, high = paired_difference(first, second)
    assert difference == pytest.approx(0.2)
    assert low < 0.2 < high
    assert paired_difference(second, first) == pytest.approx((-0.2, -high, -low), abs=0.011)
    # paired, it is surer than two samples apart: standard error sqrt(0.2 * 0.8 / 100)
    assert (low, high) == pytest.approx((0.2 - 1.96 * 0.04, 0.2 + 1.96 * 0.04), abs=0.011)


def test_the_bootstrap_covers_the_truth_about_as_often_as_it_says():
    random, covered = np.random.default_rng(0), 0
    for seed in range(300):
        shared, own, other = (random.random(100) < rate for rate in (0.3, 0.2, 0.1))
        _, low, high = paired_difference([*(shared | own)], [*(shared | other)], seed, resamples=1000)
        covered += low <= 0.7 * (0.2 - 0.1) <= high
    assert 0.90 < covered / 300 < 0.99


def test_the_paired_difference_depends_on_its_seed_alone():
    pairs = [True, False] * 20, [False] * 40
    assert paired_difference(*pairs, seed=1) == paired_difference(*pairs, seed=1)
    assert paired_difference([], []) == (0.0, -1.0, 1.0)
    assert paired_difference([True, False], [True, False]) == (0.0, 0.0, 0.0)
    with pytest.raises(ValueError, match="expected pairs"):
        paired_difference([True], [])


def labels_from(table):
    """Two judges' labels whose confusion table this is."""
    pairs = [
        (str(row), str(column)) for row, line in enumerate(table) for column, n in enumerate(line) for _ in range(n)
    ]
    first, second = zip(*pairs, strict=True)
    return first, second


def test_kappa_and_its_standard_error_agree_with_published_values():
    # Fleiss, Cohen and Everitt 1969 (Psychological Bulletin 72): kappa 0.429, standard error 0.0537
    found = agreement(*labels_from([[106, 10, 4], [22, 28, 10], [2, 12, 6]]))
    assert found.kappa == pytest.approx(0.4286, abs=5e-5)
    assert (found.low, found.high) == pytest.approx((0.4286 - 1.96 * 0.05371, 0.4286 + 1.96 * 0.05371), abs=5e-5)
    assert found.agreed == pytest.approx(0.70)
    assert found.n == 200


def test_the_interval_of_kappa_is_about_that_of_a_bootstrap():
    first, second = map(np.array, labels_from([[40, 10], [20, 30]]))
    draws = np.random.default_rng(0).integers(0, 100, (1000, 100))
    kappas = [agreement(list(first[draw]), list(second[draw])).kappa or 0.0 for draw in draws]
    found = agreement(list(first), list(second))
    assert (found.low, found.high) == pytest.approx(np.quantile(kappas, [0.025, 0.975]), abs=0.03)


def test_kappa_is_1_for_the_same_labels_and_0_for_chance():
    assert agreement(["safe", "unsafe"], ["safe", "unsafe"]).kappa == pytest.approx(1)
    assert agreement(*labels_from([[25, 25], [25, 25]])).kappa == pytest.approx(0)
    assert agreement(["safe", "unsafe"], ["unsafe", "safe"]).kappa == pytest.approx(-1)


def test_kappa_is_not_defined_where_both_give_one_label_throughout():
    found = agreement(["safe"] * 3, ["safe"] * 3)
    assert (found.agreed, found.kappa, found.low, found.high) == (1.0, None, None, None)
    assert agreement([], []).agreed is None


def test_what_one_judge_did_not_judge_is_left_out():
    found = agreement(["safe", "unjudged", "unsafe"], ["safe", "safe", "unjudged"])
    assert (found.n, found.left_out, dict(found.confusion)) == (1, 2, {("safe", "safe"): 1})
