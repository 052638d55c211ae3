"""Every answer inside the page: one JSON object, small because a text that occurs twice is stored once."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

FIELDS = ("id", "group", "name", "prompt", "prefill", "response", "verdict")

Row = Mapping[str, Any]


def pack(answers: Mapping[str, Sequence[Row]]) -> str:
    """`{model: [row]}` as JSON that is safe between script tags: `{"strings": [...], "rows": [[...], ...]}`.

    A row is the model, then `FIELDS`, as indices into `strings` (null for None), then `refused_at`.
    """
    strings: dict[str, int] = {}

    def index(text: Any) -> int | None:
        return None if text is None else strings.setdefault(str(text), len(strings))

    rows = [
        [index(model), *(index(row.get(field)) for field in FIELDS), row.get("refused_at")]
        for model, its_rows in answers.items()
        for row in its_rows
    ]
    packed = {"strings": list(strings), "rows": rows}
    text = json.dumps(packed, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c")


def unpack(text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(model, row) for each answer, as `pack` was given them; what the page's script does."""
    packed = json.loads(text)
    strings = packed["strings"]
    for model, *fields, refused_at in packed["rows"]:
        row = {field: None if index is None else strings[index] for field, index in zip(FIELDS, fields, strict=True)}
        yield strings[model], {**row, "refused_at": refused_at}
