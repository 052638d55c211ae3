"""Rows → token ids with a region for each token."""

import dataclasses
import enum
import itertools
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from derta_jax.data.recipes import Row
from derta_jax.data.template import Template
from derta_jax.interop.tokenizer import Tokenizer


class Region(enum.IntEnum):
    """What a token is part of. Response and eos carry labels."""

    PADDING = 0
    PROMPT = 1
    HARMFUL_PREFIX = 2
    RESPONSE = 3
    EOS = 4


@dataclasses.dataclass(frozen=True)
class TokenRow:
    """`token_ids` int32 [n] and `regions` uint8 [n], cut to the sequence length."""

    id: str
    recipe: str
    token_ids: np.ndarray
    regions: np.ndarray
    stream: str
    prefix_words: int | None
    truncated: bool
    pair: str | None = None

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def labelled(self) -> np.ndarray:
        """Bool [n]: tokens that are learned. The first token has nothing before it to be predicted from."""
        labelled = self.regions >= Region.RESPONSE
        labelled[:1] = False
        return labelled


def tokenise(
    rows: Iterable[Row], tokenizer: Tokenizer, template: Template, sequence_length: int, chunk: int = 512
) -> Iterator[TokenRow]:
    """Tokenise each row's whole text at once, so that tokens are those of the text as it reads.

    A token belongs to the region of its last character. Rows are closed with eos, then cut on the right: to the
    sequence, and those of a pair to half of it.
    """
    rows = iter(rows)
    while some := list(itertools.islice(rows, chunk)):
        pieces = [row_pieces(row, template) for row in some]
        texts = ["".join(parts) for parts in pieces]
        encoded = tokenizer.encode_with_offsets(texts)
        for row, parts, text, ids, offsets in zip(some, pieces, texts, *encoded, strict=True):
            ends = np.array([max(start, end - 1) for start, end in offsets], np.int64)
            regions = Region.PROMPT + np.searchsorted(np.cumsum([len(part) for part in parts[:-1]]), ends, "right")
            leading = tokenizer.leading_ids(text)
            token_ids = np.array([*leading, *ids, tokenizer.eos_id], np.int32)
            regions = np.array([Region.PROMPT] * len(leading) + [*regions, Region.EOS], np.uint8)
            longest = sequence_length if row.pair is None else sequence_length // 2
            yield TokenRow(
                id=row.id,
                recipe=row.recipe,
                token_ids=token_ids[:longest],
                regions=regions[:longest],
                stream=row.stream,
                prefix_words=row.prefix_words,
                truncated=len(token_ids) > longest,
                pair=row.pair,
            )


def units_of(rows: Sequence[TokenRow]) -> list[range]:
    """The places of rows that go together: a pair, whose rows follow each other, or one row."""
    starts = [
        place for place, row in enumerate(rows) if not place or row.pair is None or row.pair != rows[place - 1].pair
    ]
    return [range(start, end) for start, end in itertools.pairwise([*starts, len(rows)])]


def row_pieces(row: Row, template: Template) -> tuple[str, str, str]:
    """The row's text as (prompt, harmful prefix, response), spaces included."""
    if row.templated:
        return row.prompt, row.harmful_prefix, row.response
    gap = template.gap
    if row.harmful_prefix or row.double_space:
        return template.render(row.prompt), gap + row.harmful_prefix, " " + row.response
    return template.render(row.prompt), "", gap + row.response
