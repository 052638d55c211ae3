"""Rows that begin alike as one tree: what they share is computed once, and each goes on from there.

    the first row      [ trunk | its own tokens … ]        segment s
    the second row             [ its own tokens … ]        segment s + 1, positions go on where the trunk ends

A token of the second row sees its own segment and the trunk. Its first token has no label: the token before it in the
sequence is another row's. So the last of the tokens that two rows share is in both.
"""

from collections.abc import Sequence

import numpy as np

from derta_jax.data.tokenise import TokenRow, units_of


def shared_length(first: TokenRow, second: TokenRow) -> int:
    """How many tokens of the second row need not be computed beside the first."""
    length = min(len(first), len(second))
    differ = np.flatnonzero(first.token_ids[:length] != second.token_ids[:length])
    common = int(differ[0]) if len(differ) else length
    labelled = np.flatnonzero(second.labelled)
    return max(0, min(common, int(labelled[0]) - 1 if len(labelled) else common))


def grow(rows: Sequence[TokenRow], sequence_length: int) -> tuple[list[Sequence[int]], np.ndarray]:
    """(units, trunks): which rows go together, in which order, and how many tokens each leaves to the one before it.

    Pairs stay as they are. Two rows of one example, as its prefix row and its RTO row, become one unit where they fit
    into a sequence together, in the order that shares more.
    """
    units: list[Sequence[int]] = []
    trunks = np.zeros(len(rows), np.int32)
    for unit in units_of(rows):
        before = units[-1] if units else ()
        if len(unit) == 2:
            trunks[unit[1]] = shared_length(rows[unit[0]], rows[unit[1]])
        elif len(unit) == len(before) == 1 and _example(rows[unit[0]]) == _example(rows[before[0]]):
            orders = [(before[0], unit[0]), (unit[0], before[0])]
            shared, (first, second) = max((shared_length(rows[a], rows[b]), (a, b)) for a, b in orders)
            if shared and len(rows[first]) + len(rows[second]) - shared <= sequence_length:
                trunks[second] = shared
                units[-1] = (first, second)
                continue
        units.append(unit)
    return units, trunks


def _example(row: TokenRow) -> str:
    """Recipes name rows `example#kind`; what has no such name stands for itself."""
    example, sign, _ = row.id.rpartition("#")
    return example if sign else row.id
