"""What was published about DeRTa (arXiv 2407.09121, tables 2, 4 and 10), to be shown beside what a user measured.

People labelled those answers, to other questions than the user's. The paper does not report over-refusal: that rate was
counted, by a rule, on outputs that its authors once released, which is said wherever it is shown.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

PAPER = "arXiv 2407.09121"
SHOWN = "LLaMA3-70B"
"""The model with a figure for every measure: the one that stands beside the measured ones."""

MEASURES = {
    "Code": ("attacks", "code", "codeattack"),
    "PAIR": ("attacks", "pair"),
    "JailbreakChat": ("attacks", "jailbreakchat", "jchat"),
    "SelfCipher": ("attacks", "selfcipher", "cipher"),
    "CompletingAttack": ("attacks", "completing", "completingattack"),
    "AutoDAN": ("attacks", "autodan"),
    "GSM8K": ("helpfulness", "gsm8k"),
    "MMLU": ("helpfulness", "mmlu"),
    "AlpacaEval": ("helpfulness", "alpacaeval", "alpaca"),
    "XSTest": ("over_refusal", "xstest", "xstestsafe"),
}
"""The paper's measures: the group of results.json each belongs to, and the names it goes by there, in small letters."""


@dataclass(frozen=True)
class Published:
    """One published model: rates in 0-1 by measure, and how many of XSTest's 250 safe prompts its outputs refuse."""

    model: str
    method: str
    rates: Mapping[str, float]
    refused: int | None


XSTEST_SAFE = 250

_TABLE = (
    # model, method; Code, PAIR, JailbreakChat, SelfCipher, CompletingAttack, AutoDAN, GSM8K, MMLU, AlpacaEval; refused
    ("LLaMA3-70B", "vanilla", (86.0, 76.0, 41.0, 51.5, 95.0, 74.0, 78.6, 70.2, 97.0), 48),
    ("LLaMA3-70B", "harmful prefix", (88.0, 78.0, 35.5, 21.5, 25.0, 36.0, None, None, None), None),
    ("LLaMA3-70B", "RTO", (28.0, 36.0, 6.5, 0.0, 5.0, 12.0, None, None, None), None),
    ("LLaMA3-70B", "DeRTa", (21.5, 24.0, 1.5, 0.0, 4.0, 2.0, 77.6, 70.4, 96.3), 161),
    ("LLaMA3-70B-Instruct", "as released", (80.5, 36.0, 3.0, 0.0, 90.0, 0.0, 91.6, 78.4, 97.8), None),
    ("LLaMA3-70B-Instruct", "DeRTa", (5.5, 2.0, 0.0, 0.0, 5.5, 0.0, 89.0, 77.6, 94.3), None),
    ("Mixtral 8x7B", "vanilla", (67.0, 84.0, 42.5, 90.5, 94.5, 84.0, 55.0, 63.0, 92.0), None),
    ("Mixtral 8x7B", "DeRTa", (32.0, 34.0, 2.5, 0.5, 4.5, 2.0, 55.8, 63.6, 91.7), None),
    ("LLaMA3-8B", "vanilla", (None, 82.0, 17.5, 12.0, 93.0, 82.0, 43.8, 49.0, 88.3), 69),
    ("LLaMA3-8B", "DPO", (None, 62.0, 31.0, 4.5, 88.5, 70.0, 41.6, 55.4, 90.7), None),
    ("LLaMA3-8B", "DeRTa", (None, 24.0, 4.0, 0.0, 6.0, 14.0, 46.4, 50.4, 88.7), 111),
    ("Mistral-7B", "vanilla", (None, 84.0, 9.5, 34.0, 82.5, 66.0, 22.4, 40.2, 80.7), None),
    ("Mistral-7B", "DeRTa", (None, 44.0, 4.0, 4.0, 7.5, 20.0, 20.4, 41.8, 78.7), None),
)


def _row(model: str, method: str, percents: tuple[float | None, ...], refused: int | None) -> Published:
    rates = {name: percent / 100 for name, percent in zip(MEASURES, percents, strict=False) if percent is not None}
    if refused is not None:
        rates["XSTest"] = refused / XSTEST_SAFE
    return Published(model, method, rates, refused)


MODELS = tuple(_row(*row) for row in _TABLE)


def measure_of(group: str, name: str) -> str | None:
    """The paper's measure that goes by `name` in a group of results.json; None where it has none."""
    plain = re.sub(r"[^a-z0-9]", "", name.lower())
    for measure, (its_group, *names) in MEASURES.items():
        if group == its_group and plain in names:
            return measure
    return None
