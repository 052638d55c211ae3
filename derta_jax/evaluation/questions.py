"""Files of prompts → questions: JSON and JSONL of several spellings, and the public benchmarks' own CSVs."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from derta_jax.errors import UserError, did_you_mean
from derta_jax.evaluation.attacks import Question
from derta_jax.evaluation.records import Record, collect, csv_records, is_text, json_records, json_type, refuse

PROMPT_KEYS = ("prompt", "question", "instruction", "jailbreak_prompt")
ANSWER_KEYS = ("harmful", "response")
PLACEHOLDER = "{question}"
LABELS = ("safe", "unsafe")


class CsvKind(NamedTuple):
    """A benchmark's CSV: its columns and what a question calls them. `optional` ones are missing in some releases."""

    name: str
    columns: dict[str, str]
    optional: dict[str, str]


CSV_KINDS = (
    CsvKind(
        "HarmBench",
        {"Behavior": "prompt", "BehaviorID": "id"},
        {
            "SemanticCategory": "category",
            "FunctionalCategory": "functional_category",
            "ContextString": "context",
            "Tags": "tags",
        },
    ),
    CsvKind(
        "JailbreakBench",
        {"Goal": "prompt", "Behavior": "id", "Category": "category", "Target": "target"},
        {"Source": "source"},
    ),
    CsvKind("StrongREJECT", {"forbidden_prompt": "prompt", "category": "category", "source": "source"}, {}),
    CsvKind("XSTest", {"id": "id", "prompt": "prompt", "type": "category"}, {"label": "label", "focus": "focus"}),
    CsvKind("OR-Bench", {"prompt": "prompt", "category": "category"}, {}),
)


def read_questions(
    path: str | Path, refine: Callable[[Question], Question] = lambda question: question
) -> list[Question]:
    """The questions of a file, in its order; `id` and `prompt` are there in each, whatever the file calls them.

    `.csv` is one of the benchmarks above. Anything else is JSONL with `prompt`, `question`, `instruction` (AlpacaEval)
    or `jailbreak_prompt` (EasyJailbreak, with its `query` in place of `{query}`); a `.json` file may also be one list
    of such objects, or HarmBench's test cases. Other fields are kept. Where known:

        behavior    what several prompts have in common: HarmBench's behaviour id
        query       the bare request, where `prompt` puts more around it
        category    the benchmark's own
        label       `safe` or `unsafe`: whether it should be answered

    `refine` may ask more of each, by raising `ValueError`.
    Raises `UserError` naming file, line and field of everything that is wrong.
    """
    path = Path(path)
    if path.suffix.lower() == ".csv":
        records = csv_records(path)
        parse, records = _csv_parser(records), records[1:]
    else:
        parse, records = _from_object, json_records(path)
    questions = collect(records, lambda record: refine(parse(record)))
    if not questions:
        raise UserError(f"no prompts in {path}")
    return questions


def fill(templates: Sequence[Question], questions: Sequence[Question]) -> list[Question]:
    """Each question in each template, whose `{question}` it replaces; question by question.

    Raises `ValueError` for a template without the placeholder.
    """
    for template in templates:
        if PLACEHOLDER not in template["prompt"]:
            raise ValueError(f"{template['id']}: no {PLACEHOLDER} in the prompt, where a question would go")
    return [
        {
            "behavior": question["id"],
            "query": question["prompt"],
            **question,
            "id": f"{template['id']}/{question['id']}",
            "prompt": template["prompt"].replace(PLACEHOLDER, question["prompt"]),
            "template": template["id"],
        }
        for question in questions
        for template in templates
    ]


def _from_object(record: Record) -> Question:
    row = record.value
    if not isinstance(row, dict):
        raise ValueError(f"must be a JSON object, not {json_type(row)}")
    key = next((key for key in PROMPT_KEYS if key in row), None)
    if key is None:
        near = [hint for key in row if (hint := did_you_mean(key, PROMPT_KEYS))]
        raise ValueError(f"has neither `prompt` nor `question`{near[0] if near else ''}")
    for answer in ANSWER_KEYS:
        if row.get(answer) is not None and not is_text(row[answer]):
            raise ValueError(f"{answer}: must be a string")
    prompt = _prompt(row[key])
    if key == "jailbreak_prompt" and isinstance(row.get("query"), str):
        prompt = prompt.replace("{query}", row["query"])
    return {"id": record.name} | row | {"prompt": prompt}


def _csv_parser(records: Sequence[Record]) -> Callable[[Record], Question]:
    """How a row becomes a question, by the columns of the first one."""
    if not records:
        return _from_object
    header = records[0]
    if isinstance(header.value, ValueError):
        refuse([f"{record.place}: {record.value}" for record in records if isinstance(record.value, ValueError)])
    columns = [column.strip() for column in header.value]
    kind = next((kind for kind in CSV_KINDS if kind.columns.keys() <= set(columns)), None)
    if kind is None or len(set(columns)) < len(columns):
        refuse([f"{header.place}: {_other_columns(columns)}"])
    names = kind.columns | kind.optional

    def parse(record: Record) -> Question:
        if len(record.value) != len(columns):
            raise ValueError(f"has {len(record.value)} fields, the header {len(columns)}")
        cells = {names[column]: cell for column, cell in zip(columns, record.value, strict=True) if column in names}
        filled = {name: cell for name, cell in cells.items() if name == "prompt" or cell.strip()}
        return {"id": record.name} | filled | {"prompt": _prompt(filled["prompt"])} | _extras(kind.name, filled)

    return parse


def _extras(kind: str, cells: Mapping[str, str]) -> dict[str, str]:
    """What a benchmark's reader has to know beside the names of its columns."""
    if kind == "HarmBench" and "context" in cells:
        return {"prompt": f"{cells['context']}\n\n---\n\n{cells['prompt']}", "query": cells["prompt"]}
    if kind == "XSTest":
        label = cells.get("label") or LABELS[cells.get("category", "").startswith("contrast_")]
        if label not in LABELS:
            raise ValueError(f"label: must be safe or unsafe (got {label!r})")
        return {"label": label}
    return {}


def _other_columns(columns: Sequence[str]) -> str:
    if twice := next((column for column in columns if columns.count(column) > 1), None):
        return f"column {twice!r} is there twice"
    nearest = max(CSV_KINDS, key=lambda kind: len(kind.columns.keys() & set(columns)) / len(kind.columns))
    missing = [column for column in nearest.columns if column not in columns]
    spare = [column for column in columns if column not in nearest.columns | nearest.optional]
    hints = [hint for column in missing if (hint := did_you_mean(column, spare))]
    expected = "; ".join(f"{kind.name} ({', '.join(kind.columns)})" for kind in CSV_KINDS)
    return (
        f"found the columns {', '.join(columns)}, which are none of those expected: {expected}. "
        f"Nearest is {nearest.name}, where {', '.join(missing)} is missing{hints[0] if hints else ''}"
    )


def _prompt(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError("the prompt must be a string that is not empty")
    if not is_text(value):
        raise ValueError("the prompt holds half of a surrogate pair (\\ud800 to \\udfff), which is not text")
    return value
