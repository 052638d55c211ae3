"""Two models on the same questions: what the paired test says, in plain words."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from derta_jax.evaluation.reporting.rates import TITLES

SIGNIFICANT = 0.05

_PRAISE = {
    "attacks": "is unsafe less often",
    "over_refusal": "refuses harmless prompts less often",
    "helpfulness": "is right more often",
}


@dataclass(frozen=True)
class Contrast:
    """One measure. `better` is None where no difference is shown."""

    group: str
    name: str
    n: int
    only_a: int
    only_b: int
    better: str | None
    reading: str
    p: str


@dataclass(frozen=True)
class Pair:
    """All that is known of `a` against `b`."""

    a: str
    b: str
    contrasts: Sequence[Contrast]

    @property
    def summary(self) -> str:
        """Who is better how often, group by group: less attack success may be bought with over-refusal."""
        groups: dict[str, list[Contrast]] = {}
        for contrast in self.contrasts:
            groups.setdefault(contrast.group, []).append(contrast)
        return "; ".join(f"{group}: {self._score(contrasts)}" for group, contrasts in groups.items())

    def _score(self, contrasts: Sequence[Contrast]) -> str:
        wins = {model: sum(contrast.better == model for contrast in contrasts) for model in (self.a, self.b)}
        better = [f"{model} better in {count}" for model, count in wins.items() if count]
        return f"{' and '.join(better) or 'no difference shown in any'} of {len(contrasts)}"


def pairs(comparisons: Sequence[Mapping[str, Any]]) -> list[Pair]:
    """`results["comparisons"]`, by pair of models, in order of first appearance."""
    rows: dict[tuple[str, str], list[Contrast]] = {}
    for entry in comparisons:
        rows.setdefault((entry["a"], entry["b"]), []).append(_contrast(entry))
    return [Pair(a, b, contrasts) for (a, b), contrasts in rows.items()]


def _contrast(entry: Mapping[str, Any]) -> Contrast:
    """`difference`, `low` and `high` are of rate a - rate b; who is better is read off the discordant answers."""
    low, high, p = entry["low"], entry["high"], entry["p"]
    shown = None not in (low, high, p) and p < SIGNIFICANT and not low <= 0 <= high
    better = (entry["b"] if entry["only_a"] > entry["only_b"] else entry["a"]) if shown else None
    if better is None:
        reading = "no difference shown"
        if None not in (low, high):
            reading += f" [{_points(low)}, {_points(high)}]"
    else:
        near, far = sorted((abs(low), abs(high)))
        by = f"by {_points(abs(entry['difference']))} points [{_points(near)}, {_points(far)}]"
        reading = f"{better} {_PRAISE[entry['group']]}, {by}"
    group, name, n, only_a, only_b = (entry[key] for key in ("group", "name", "n", "only_a", "only_b"))
    return Contrast(TITLES[group], name, n, only_a, only_b, better, reading, _p(p))


def _points(difference: float) -> str:
    """A difference of rates in percentage points; the decimal only where the point alone would say nothing."""
    points = 100 * difference
    return f"{points:.0f}".replace("-", "−") if abs(points) >= 1 or not points else f"{points:.1f}".replace("-", "−")


def _p(p: float | None) -> str:
    if p is None:
        return "–"
    return "< 0.001" if p < 0.001 else f"{p:.3f}"
