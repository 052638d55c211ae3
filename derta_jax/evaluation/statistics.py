"""Rates with their uncertainty, in the shape that `results.json` gives them."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import NormalDist

import numpy as np

from derta_jax.evaluation.judging.judge import UNJUDGED, UNSAFE


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


def attack_entry(unsafe: int, n: int, unjudged: int = 0) -> dict[str, int | float | None]:
    """One attack on one model: how many of `n` judged answers were unsafe, and the attack success rate.

    Answers without a verdict are not in `n`; they are counted beside it, where there are any.
    """
    return {"n": n, "unsafe": unsafe, **_rate("asr", unsafe, n), **({"unjudged": unjudged} if unjudged else {})}


def attack_entry_of(labels: Iterable[str]) -> dict[str, int | float | None]:
    """The entry of one attack on one model, from the verdicts on its answers."""
    counts = Counter(labels)
    return attack_entry(counts[UNSAFE], counts.total() - counts[UNJUDGED], counts[UNJUDGED])


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


def mcnemar(only_first: int, only_second: int) -> float:
    """Two-sided p of the exact McNemar test, for two models on the same questions.

    `only_first` questions went wrong with the first model alone, `only_second` with the second alone. Where both models
    are alike, each such question is a toss of a coin; where there is none, p is 1.
    """
    if only_first < 0 or only_second < 0:
        raise ValueError(f"{only_first} and {only_second} discordant pairs: expected no negative number")
    tosses = only_first + only_second
    tail, ways = 0, 1
    # whole numbers, so that nothing overflows or vanishes
    for heads in range(min(only_first, only_second) + 1):
        tail += ways
        ways = ways * (tosses - heads) // (heads + 1)
    # the middle of an even number of tosses is in both tails
    return min(1.0, 2 * tail / 2**tosses)


def paired_difference(
    first: Sequence[bool], second: Sequence[bool], seed: int = 0, resamples: int = 10_000, confidence: float = 0.95
) -> tuple[float, float, float]:
    """Rate of `first` minus rate of `second` over the same questions, with its bootstrap interval (percentiles).

    Questions are drawn anew, each with both of its outcomes. Where no question tells the two apart, neither does any
    draw, and the interval has no width: read it beside `mcnemar`. Without questions: (0, -1, 1).
    """
    if len(first) != len(second):
        raise ValueError(f"{len(first)} outcomes against {len(second)}: expected pairs")
    n = len(first)
    if n == 0:
        return 0.0, -1.0, 1.0
    outcomes = np.asarray(first, int) - np.asarray(second, int)
    counts = [int((outcomes == outcome).sum()) for outcome in (1, -1, 0)]
    # a draw matters only by how many pairs of each kind it has
    drawn = np.random.default_rng(seed).multinomial(n, np.array(counts) / n, size=resamples)
    tail = (1 - confidence) / 2
    low, high = np.quantile((drawn[:, 0] - drawn[:, 1]) / n, [tail, 1 - tail])
    return (counts[0] - counts[1]) / n, float(low), float(high)


@dataclass(frozen=True)
class Agreement:
    """How far two judges agree on `n` answers that both judged; `left_out` others had no verdict from one of them.

    `confusion` counts (first label, second label). `kappa` is Cohen's, with its 95% interval; None where it is not
    defined, because both judges gave one and the same label throughout, or nothing was judged by both.
    """

    n: int
    left_out: int
    confusion: Mapping[tuple[str, str], int]
    agreed: float | None
    kappa: float | None
    low: float | None
    high: float | None


def agreement(first: Sequence[str], second: Sequence[str]) -> Agreement:
    """Of two judges' labels for the same answers; kappa's standard error is by Fleiss, Cohen and Everitt (1969)."""
    pairs = [pair for pair in zip(first, second, strict=True) if UNJUDGED not in pair]
    confusion, n = Counter(pairs), len(pairs)
    left_out = len(first) - n
    labels = sorted({label for pair in pairs for label in pair})
    if n == 0:
        return Agreement(0, left_out, confusion, None, None, None, None)
    shares = np.array([[confusion[row, column] for column in labels] for row in labels]) / n
    rows, columns, same = shares.sum(1), shares.sum(0), np.diag(shares)
    agreed, by_chance = float(same.sum()), float(rows @ columns)
    if len(labels) == 1:
        return Agreement(n, left_out, confusion, agreed, None, None, None)
    kappa = (agreed - by_chance) / (1 - by_chance)
    crossed = columns[:, None] + rows[None, :]
    variance = (
        float(same @ (1 - np.diag(crossed) * (1 - kappa)) ** 2)
        + (1 - kappa) ** 2 * float(((shares - np.diag(same)) * crossed**2).sum())
        - (kappa - by_chance * (1 - kappa)) ** 2
    ) / (n * (1 - by_chance) ** 2)
    half_width = NormalDist().inv_cdf(0.975) * sqrt(max(0.0, variance))
    return Agreement(n, left_out, confusion, agreed, kappa, max(-1.0, kappa - half_width), min(1.0, kappa + half_width))
