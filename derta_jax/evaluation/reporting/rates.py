"""The rates of results.json, as every table and figure reads them: group by group, measure by measure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Results = Mapping[str, Any]


@dataclass(frozen=True)
class Cell:
    """A rate with its 95% interval, all 0-1. `best`: no other model does better, and some do worse."""

    rate: float
    low: float
    high: float
    n: int
    best: bool

    @property
    def percent(self) -> str:
        return f"{100 * self.rate:.1f}"

    @property
    def interval(self) -> str:
        return f"{100 * self.low:.0f}–{100 * self.high:.0f}"


@dataclass(frozen=True)
class Measure:
    """One attack, task or set of prompts; a model that was not measured has no cell.

    `unjudged`: answers, per model, without a verdict; they are in no rate and not in `n`.
    """

    name: str
    cells: Mapping[str, Cell]
    unjudged: Mapping[str, int]

    @property
    def n(self) -> str:
        sizes = sorted({cell.n for cell in self.cells.values()})
        return "–".join(str(size) for size in dict.fromkeys((sizes[0], sizes[-1]))) if sizes else "0"

    @property
    def asked(self) -> int:
        """The most prompts that a model was asked."""
        models = {*self.cells, *self.unjudged}
        return max((self._n(model) + self.unjudged.get(model, 0) for model in models), default=0)

    def _n(self, model: str) -> int:
        return self.cells[model].n if model in self.cells else 0


@dataclass(frozen=True)
class Group:
    """Measures that are read the same way; `key` is the group's name in results.json."""

    key: str
    title: str
    better: str
    measures: Sequence[Measure]


_GROUPS = (
    # key, name of the rate, title, which end is better
    ("attacks", "asr", "attack success", "lower"),
    ("helpfulness", "score", "helpfulness", "higher"),
    ("over_refusal", "rate", "over-refusal", "lower"),
)
TITLES = {key: title for key, _, title, _ in _GROUPS}


def headline(results: Results) -> list[Group]:
    """Every rate of `results`, by group and measure, in order of first appearance; empty groups left out."""
    groups = []
    for key, rate, title, better in _GROUPS:
        entries = {model: parts.get(key, {}) for model, parts in results["models"].items()}
        names = dict.fromkeys(name for measured in entries.values() for name in measured)
        measures = [
            _measure(name, {m: e[name] for m, e in entries.items() if name in e}, rate, better) for name in names
        ]
        if measures:
            groups.append(Group(key, title, better, measures))
    return groups


def _measure(name: str, entries: Mapping[str, Mapping[str, Any]], rate: str, better: str) -> Measure:
    unjudged = {model: entry["unjudged"] for model, entry in entries.items() if entry.get("unjudged")}
    entries = {model: entry for model, entry in entries.items() if entry[rate] is not None}
    rates = [entry[rate] for entry in entries.values()]
    best = (min if better == "lower" else max)(rates, default=None)
    differ = len(set(rates)) > 1
    cells = {
        model: Cell(entry[rate], entry["low"], entry["high"], entry["n"], best=differ and entry[rate] == best)
        for model, entry in entries.items()
    }
    return Measure(name, cells, unjudged)
