"""What people read: results.json, the terminal's table, Markdown, and one HTML file."""

import io
import json
import re

import pytest
from rich.console import Console

from derta_jax.evaluation.report import render_report, results_markdown, results_table, write_results
from derta_jax.evaluation.statistics import attack_entry, helpfulness_entry, over_refusal_entry

ATTACKS = ["plain", "role-play", "code", "affirm", "prefill-2", "prefill-5", "prefill-9", "completing"]
UNSAFE = {"vanilla": 91, "recaug": 36, "rto": 1, "derta": 0}


def results():
    models = {
        name: {
            "attacks": {attack: attack_entry(unsafe, 100) for attack in ATTACKS},
            "helpfulness": {"recipes": helpfulness_entry(198, 200)},
            "over_refusal": {"look-alikes": over_refusal_entry(40 - unsafe // 3, 100)},
            "refusal_position": {"le_5": 0.7, "6_30": 0.2, "gt_30": 0.1, "glued": 0.05},
        }
        for name, unsafe in UNSAFE.items()
    }
    return {"judge": {"name": "refusal-rule", "version": "1"}, "models": models}


def terminal(table, width=100):
    out = io.StringIO()
    Console(file=out, width=width).print(table)
    return out.getvalue()


# results.json


def test_results_are_written_whole_and_read_back_the_same(tmp_path):
    path = tmp_path / "run" / "results.json"
    write_results(results(), path)
    assert json.loads(path.read_text()) == results()
    assert [p.name for p in path.parent.iterdir()] == ["results.json"]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "results.json"
    write_results(results(), path)
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_results({"asr": float("nan")}, path)
    assert json.loads(path.read_text()) == results()
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]


# terminal and Markdown


def test_the_terminal_table_has_one_line_per_measure_at_100_columns():
    lines = terminal(results_table(results())).splitlines()
    assert max(map(len, lines)) <= 100
    for measure in [*ATTACKS, "recipes", "look-alikes"]:
        (line,) = [line for line in lines if line.split()[:1] == [measure]]
        assert line.count("(") == len(UNSAFE)
        assert line.split()[1] in ("100", "200")
    (plain,) = [line for line in lines if "plain" in line]
    cells = re.split(r"\s{2,}", plain.strip())
    assert cells == ["plain", "100", "91.0 (84–95)", "36.0 (27–46)", "1.0 (0–5)", "0.0 (0–4)"]


def test_the_judge_is_named_beside_the_numbers():
    for text in (terminal(results_table(results())), results_markdown(results())):
        assert "judge: refusal-rule 1" in text
        assert "Wilson 95%" in text


def test_markdown_and_terminal_show_the_same_numbers():
    def numbers(text):
        return re.findall(r"\d+\.\d \(\d+–\d+\)", text.replace("*", ""))

    in_markdown = numbers(results_markdown(results()))
    assert in_markdown == numbers(terminal(results_table(results())))
    assert len(in_markdown) == len(UNSAFE) * (len(ATTACKS) + 2)


def test_markdown_marks_the_lowest_attack_success_and_the_highest_helpfulness():
    scores = results()
    scores["models"]["rto"]["helpfulness"]["recipes"] = helpfulness_entry(200, 200)
    lines = results_markdown(scores).splitlines()
    assert "| plain | 100 | 91.0 (84–95) | 36.0 (27–46) | 1.0 (0–5) | **0.0** (0–4) |" in lines
    assert re.findall(r"\*\*(\S+)\*\*", next(line for line in lines if "recipes" in line)) == ["100.0"]


def test_where_all_are_equal_none_is_best():
    assert "**" not in next(line for line in results_markdown(results()).splitlines() if "recipes" in line)


def test_what_was_not_measured_is_a_dash():
    scores = results()
    del scores["models"]["rto"]["attacks"]["code"]
    scores["models"]["derta"]["attacks"]["code"] = attack_entry(0, 0)
    (line,) = [line for line in results_markdown(scores).splitlines() if line.startswith("| code |")]
    assert line.endswith("| – | – |")


def test_names_are_not_taken_for_markup():
    scores = {"judge": {"name": "a_b", "version": "1"}, "models": {"[bold]x|y": results()["models"]["rto"]}}
    assert "[bold]x|y" in terminal(results_table(scores))
    assert r"\[bold]x\|y" in results_markdown(scores)
    assert r"a\_b" in results_markdown(scores)


def test_answers_without_a_verdict_are_shown_beside_the_rate():
    scores = results()
    scores["models"]["rto"]["attacks"]["code"]["unjudged"] = 3
    scores["models"]["derta"]["attacks"]["code"] = attack_entry(0, 0) | {"unjudged": 100}
    (line,) = [line for line in results_markdown(scores).splitlines() if line.startswith("| code |")]
    assert line.endswith("| **1.0** (0–5) 3 unjudged | – 100 unjudged |")
    assert "1.0 (0–5) 3 unjudged" in re.sub(r" +", " ", terminal(results_table(scores), width=200))


# HTML


def test_a_report_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "run" / "report.html"
    render_report(results(), {"title": "half a character: \ud800"}, path)
    old = path.read_text(encoding="utf-8")
    assert "half a character: ?" in old
    answer = {"tokens": ["a", "b"], "p_refusal": [0.5], "verdict": "safe"}
    uneven = {"title": "t", "prompt": "", "prefill": None, "answers": {"rto": answer}}
    with pytest.raises(ValueError, match="example 't', rto: 2 tokens but 1 values of p_refusal"):
        render_report(results(), {"examples": [uneven]}, path)
    assert path.read_text(encoding="utf-8") == old
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]
