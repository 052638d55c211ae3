"""Answers as files of other tools, so that their judges can be run on them; `read_questions` reads their prompts.

Rows are those of an evaluation's `answers/MODEL.jsonl`: a question's fields, `group` and `name` of its set, `response`.
What a model continued from a prefill is its own words alone, as our judges see them.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from derta_jax.errors import UserError, did_you_mean
from derta_jax.evaluation.files import write_rows, write_whole

Row = Mapping[str, Any]

TOOLS = ("alpaca", "harmbench", "easyjailbreak")


def hand_over(path: str | Path, name: str, tool: str, output: str | Path) -> int:
    """Write the answers of one set for one of `TOOLS`; returns how many. AlpacaEval knows the model by the file's name.

    Raises `UserError` where there are none of that name.
    """
    rows = read_answers(path, name)
    if tool == "easyjailbreak":
        write_rows(easyjailbreak(rows), output)
    else:
        shaped = alpaca_eval(rows, Path(path).stem) if tool == "alpaca" else harmbench(rows)
        write_whole(json.dumps(shaped, indent=2, ensure_ascii=False) + "\n", output)
    return len(rows)


def read_answers(path: str | Path, name: str) -> list[Row]:
    """The answers of one attack, task or set. Raises `UserError` where there are none of that name."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no answers file {path}")
    try:
        rows: list[Row] = [json.loads(line) for line in path.read_bytes().split(b"\n") if line.strip()]
        names = dict.fromkeys(row["name"] for row in rows)
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} does not hold the answers of an evaluation ({error})") from error
    if name not in names:
        raise UserError(f"{path} has answers to {', '.join(names)}, not to {name!r}{did_you_mean(name, names)}")
    return [row for row in rows if row["name"] == name]


def alpaca_eval(rows: Iterable[Row], generator: str) -> list[dict[str, str]]:
    """AlpacaEval's list of model outputs (`alpaca_eval --model_outputs`)."""
    return [
        {
            "dataset": row.get("dataset", ""),
            "instruction": row.get("instruction", row["prompt"]),
            "output": row["response"],
            "generator": generator,
        }
        for row in rows
    ]


def harmbench(rows: Iterable[Row]) -> dict[str, list[dict[str, str]]]:
    """HarmBench's completions (`evaluate_completions.py --completions_path`): those to each behaviour's prompts."""
    completions: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        completion = {"test_case": row["prompt"], "generation": row["response"]}
        completions.setdefault(str(row.get("behavior", row["id"])), []).append(completion)
    return completions


def easyjailbreak(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """EasyJailbreak's instances, not yet evaluated (`JailbreakDataset.load_jsonl`)."""
    return [
        {
            "jailbreak_prompt": row["prompt"],
            "query": row.get("query", row["prompt"]),
            "target_responses": [row["response"]],
            "eval_results": [],
        }
        for row in rows
    ]
