"""What a row becomes: every token with its region, label and weight, for programs and for people."""

import io
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from derta_jax.data.loader import keep_labels
from derta_jax.data.row_maker import RowMaker
from derta_jax.data.tokenise import Region, TokenRow
from derta_jax.errors import UserError
from derta_jax.interop.tokenizer import Tokenizer

NO_LABEL = -100

STYLES = {
    Region.PROMPT: "cyan",
    Region.HARMFUL_PREFIX: "red",
    Region.RESPONSE: "green",
    Region.EOS: "bold green",
}
REFUSAL_STYLE = "bold white on dark_orange3"


def inspect_row(row: TokenRow, tokenizer: Tokenizer, objective: RowMaker, refusal_id: int, seed: int) -> dict[str, Any]:
    """`tokens`, `token_ids`, `regions`, `labels` and `weights` of the row in its first epoch, with counts.

    `labels[i]` is what the model learns to say at place i, given everything before it; -100 where nothing is learned.
    With `objective.paper` the draw of RTO labels depends on the longest row of a micro-batch; the row's own length
    stands in for it here.
    """
    keep = keep_labels(row, objective, seed, epoch=0, padded_length=len(row))
    refusing = row.stream in objective.refusing
    labels = np.where(keep, refusal_id if refusing else row.token_ids, NO_LABEL)
    weights = keep * objective.weight(row.stream)
    regions = [Region(region).name.lower() for region in row.regions]
    return {
        "id": row.id,
        "recipe": row.recipe,
        "stream": row.stream,
        "refusing": refusing,
        "prefix_words": row.prefix_words,
        "truncated": row.truncated,
        "tokens": tokenizer.token_texts(row.token_ids.tolist()),
        "token_ids": row.token_ids.tolist(),
        "regions": regions,
        "labels": labels.tolist(),
        "weights": weights.tolist(),
        "counts": dict(Counter(regions)) | {"labelled": int(keep.sum()), "total": len(row)},
    }


def render_row(inspected: dict[str, Any], refusal_text: str) -> Text:
    """The row as coloured text; a token that learns the refusal is marked, one without a label is dim."""
    prefix = "" if inspected["prefix_words"] is None else f", {inspected['prefix_words']} prefix words"
    cut = ", cut" if inspected["truncated"] else ""
    counts = ", ".join(f"{name} {count}" for name, count in inspected["counts"].items())
    text = Text(
        f"{inspected['id']}  ({inspected['recipe']} {inspected['stream']}{prefix}{cut}; {counts})\n", style="bold"
    )
    for token, region, label in zip(inspected["tokens"], inspected["regions"], inspected["labels"], strict=True):
        style = STYLES[Region[region.upper()]]
        if label == NO_LABEL:
            text.append(token, f"dim {style}")
        elif inspected["refusing"]:
            text.append(token, REFUSAL_STYLE)
            text.append(f"→{refusal_text} ", "dim")
        else:
            text.append(token, style)
    return text


def legend(refusal_text: str) -> Text:
    """What the colours of `render_row` mean."""
    text = Text("prompt", style=STYLES[Region.PROMPT])
    text.append("  harmful prefix", f"dim {STYLES[Region.HARMFUL_PREFIX]}")
    text.append("  response learned", STYLES[Region.RESPONSE])
    text.append("  ")
    text.append(f"learns {refusal_text!r} here", REFUSAL_STYLE)
    text.append("  dim: no label")
    return text


def save_picture(texts: Iterable[Text], file: str | Path) -> None:
    """The texts one below the other as SVG, which needs no font from a network. Raises `UserError`."""
    console = Console(record=True, file=io.StringIO(), width=100)
    for text in texts:
        console.print(text, soft_wrap=False)
    svg = re.sub(r"@font-face \{.*?\}", "", console.export_svg(title=""), flags=re.DOTALL)
    try:
        Path(file).write_text(svg, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {file}: {error.strerror or error}") from error


def counts_table(inspected: Iterable[dict[str, Any]]) -> Table:
    """Rows and tokens by recipe and stream."""
    rows: Counter[tuple[str, str]] = Counter()
    tokens: dict[tuple[str, str], Counter[str]] = {}
    for row in inspected:
        key = (row["recipe"], row["stream"])
        rows[key] += 1
        tokens.setdefault(key, Counter()).update(row["counts"])
    table = Table(
        "recipe", "stream", *("rows", "tokens", "prompt", "prefix", "answer", "eos", "learned"), box=box.SIMPLE
    )
    for key in sorted(rows):
        count = tokens[key]
        cells = (
            rows[key],
            *(count[name] for name in ("total", "prompt", "harmful_prefix", "response", "eos", "labelled")),
        )
        table.add_row(*key, *(f"{cell:,}" for cell in cells))
    return table
