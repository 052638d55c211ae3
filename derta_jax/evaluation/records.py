"""What untrusted files hold, record by record, each with its place; all that is wrong with a file in one message."""

import codecs
import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from derta_jax.errors import UserError

MAX_PROBLEMS_SHOWN = 20


class Record(NamedTuple):
    """A parsed line, row or item; `value` is a `ValueError` where it could not be parsed.

    `place` is what a message calls it, `name` what it is called where it brings no id of its own.
    """

    place: str
    name: str
    value: Any


def json_records(path: str | Path) -> list[Record]:
    """The lines of a JSONL file. A `.json` file may be JSONL, too, or one document, and then it is its items."""
    path = Path(path)
    data = _read(path)
    lines = [(number, line) for number, line in enumerate(data.split(b"\n"), start=1) if line.strip()]
    if path.suffix.lower() == ".json" and lines and (len(lines) == 1 or not isinstance(_loads(lines[0][1]), dict)):
        return list(_items(path, data))
    return [Record(f"{path}:{number}", f"{path.stem}-{number}", _loads(line)) for number, line in lines]


def csv_records(path: str | Path) -> list[Record]:
    """The rows of a CSV file, its header among them, as lists of strings. A row is where it starts."""
    path = Path(path)
    data = _read(path)
    wrong = [
        Record(f"{path}:{number}", "", _not_utf8(error))
        for number, line in enumerate(data.split(b"\n"), start=1)
        if (error := _decoding_error(line))
    ]
    return wrong or list(_rows(path, data.decode("utf-8")))


def collect(records: Iterable[Record], parse: Callable[[Record], Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Every record parsed into something with an `id` of its own.

    `parse` raises `ValueError` for what is wrong with one. Raises `UserError` that lists all of them with their places.
    """
    parsed, problems = [], []
    seen: dict[str, str] = {}
    for record in records:
        try:
            if isinstance(record.value, ValueError):
                raise record.value
            row = parse(record)
            if (key := _id(row["id"])) in seen:
                raise ValueError(f"id: {row['id']!r} is already used at {seen[key]}")
        except ValueError as error:
            problems.append(f"{record.place}: {error}")
        else:
            seen[key] = record.place
            parsed.append(row)
    if problems:
        refuse(problems)
    return parsed


def refuse(problems: Sequence[str]) -> NoReturn:
    """Raise the `UserError` that lists the first of them."""
    shown = list(problems[:MAX_PROBLEMS_SHOWN])
    if len(problems) > len(shown):
        shown.append(f"… and {len(problems) - len(shown)} more")
    raise UserError("the prompts have problems:\n" + "\n".join(f"  {problem}" for problem in shown))


def json_type(value: Any) -> str:
    """What JSON calls it, for messages."""
    names = {dict: "an object", list: "an array", bool: "a boolean", type(None): "null", str: "a string"}
    return names.get(type(value), "a number")


def is_text(value: Any) -> bool:
    """Whether it is a string without halves of surrogate pairs, which JSON can hold and no file can."""
    return isinstance(value, str) and not any("\ud800" <= char <= "\udfff" for char in value)


def _read(path: Path) -> bytes:
    if not path.is_file():
        raise UserError(f"no prompts file {path}")
    return path.read_bytes().removeprefix(codecs.BOM_UTF8)


def _loads(data: bytes, lines: bool = True) -> Any:
    """What the JSON says, or the `ValueError` that says why it says nothing."""
    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=_unique_keys)
    except UnicodeDecodeError as error:
        return _not_utf8(error)
    except json.JSONDecodeError as error:
        where = f"column {error.colno}" if lines else f"line {error.lineno}, column {error.colno}"
        return ValueError(f"not valid JSON at {where}: {error.msg}")
    except RecursionError:
        return ValueError("not valid JSON: nested too deeply")
    except ValueError as error:
        return error


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"{next(key for key in keys if keys.count(key) > 1)!r} is there twice")
    return found


def _items(path: Path, data: bytes) -> Iterator[Record]:
    """A list's items; or the prompts of HarmBench's test cases, `{behaviour id: [prompt, …]}`, each as an object."""
    document = _loads(data, lines=False)
    if isinstance(document, ValueError):
        yield Record(str(path), "", document)
    elif isinstance(document, list):
        for number, item in enumerate(document, start=1):
            yield Record(f"{path}: item {number}", f"{path.stem}-{number}", item)
    elif isinstance(document, dict) and all(isinstance(cases, list) for cases in document.values()):
        for behavior, cases in document.items():
            for number, case in enumerate(cases, start=1):
                name = behavior if len(cases) == 1 else f"{behavior}/{number}"
                yield Record(f"{path}: {behavior!r}, test case {number}", name, {"prompt": case, "behavior": behavior})
    else:
        yield Record(f"{path}:1", f"{path.stem}-1", document)


def _rows(path: Path, text: str) -> Iterator[Record]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    while True:
        number = reader.line_num + 1
        try:
            row = next(reader, None)
        except csv.Error as error:
            yield Record(f"{path}:{number}", "", ValueError(f"not valid CSV in the row that starts here: {error}"))
            return
        if row is None:
            return
        if row:
            yield Record(f"{path}:{number}", f"{path.stem}-{number}", row)


def _decoding_error(line: bytes) -> UnicodeDecodeError | None:
    try:
        line.decode("utf-8")
    except UnicodeDecodeError as error:
        return error
    return None


def _not_utf8(error: UnicodeDecodeError) -> ValueError:
    return ValueError(f"byte {error.start + 1} of the line is not UTF-8")


def _id(value: Any) -> str:
    """Ids are written into files of other tools, where 1 and "1" are the same."""
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError(f"id: must be a string or a whole number, not {json_type(value)}")
    if not str(value).strip() or not is_text(str(value)):
        raise ValueError("id: must be text that is not empty")
    return str(value)
