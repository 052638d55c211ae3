"""Rates and their intervals."""

import pytest

from derta_jax.evaluation.statistics import attack_entry, helpfulness_entry, over_refusal_entry, wilson


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
