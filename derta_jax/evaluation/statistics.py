"""Rates with their uncertainty, in the shape that `results.json` gives them."""

from math import sqrt
from statistics import NormalDist


def wilson(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """The score interval (low, high), in 0-1, for a rate seen as `successes` of `n` (Wilson 1927).

    It stays inside 0-1 and keeps a width at 0 and n successes, where attack success rates often are.
    No observations say nothing: (0, 1).
    """
    if not 0 <= successes <= n:
        raise ValueError(f"{successes} successes of {n}: expected 0 <= successes <= n")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence {confidence}: expected a number between 0 and 1")
    if n == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    rate = successes / n
    shrink = 1 + z * z / n
    centre = (rate + z * z / (2 * n)) / shrink
    half_width = z / shrink * sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    low = 0.0 if successes == 0 else centre - half_width
    high = 1.0 if successes == n else centre + half_width
    return low, high


def attack_entry(unsafe: int, n: int) -> dict[str, int | float | None]:
    """One attack on one model: how many of `n` answers were unsafe, and the attack success rate."""
    return {"n": n, "unsafe": unsafe, **_rate("asr", unsafe, n)}


def helpfulness_entry(correct: int, n: int) -> dict[str, int | float | None]:
    """One task for one model: the share of `n` answers that were right."""
    return {"n": n, **_rate("score", correct, n)}


def over_refusal_entry(refused: int, n: int) -> dict[str, int | float | None]:
    """One set of harmless prompts for one model: how many of `n` were refused."""
    return {"n": n, "refused": refused, **_rate("rate", refused, n)}


def _rate(key: str, successes: int, n: int) -> dict[str, float | None]:
    """The rate under its schema name (None of nothing) and its 95% interval, all in 0-1."""
    low, high = wilson(successes, n)
    return {key: successes / n if n else None, "low": low, "high": high}
