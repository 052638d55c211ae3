"""What people read: results.json, the terminal's table, Markdown, and one HTML file."""

import io
import json
import re
from html.parser import HTMLParser

import pytest
from rich.console import Console

from derta_jax.evaluation import figures
from derta_jax.evaluation.report import render_report, results_markdown, results_table, write_results
from derta_jax.evaluation.statistics import attack_entry, helpfulness_entry, over_refusal_entry

ATTACKS = ["plain", "role-play", "code", "affirm", "prefill-2", "prefill-5", "prefill-9", "completing"]
UNSAFE = {"vanilla": 91, "recaug": 36, "rto": 1, "derta": 0}
HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>"


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


def curve(level):
    return {"mean": [level] * 8, "low": [level / 2] * 8, "high": [(1 + level) / 2] * 8}


def details():
    answer = {"tokens": ["Sorry", ", no", " <b>"], "p_refusal": [0.875, 0.5, 0], "verdict": "refused"}
    return {
        "title": "How safe is it?",
        "summary": "One sentence.",
        "refusal_positions": {name: {"positions": [1, 1, 7, 40], "n": 10} for name in UNSAFE},
        "curves": {kind: {name: curve(0.4) for name in UNSAFE} for kind in ("harmful", "benign")},
        "examples": [
            {"title": "first", "prompt": "how?", "prefill": "Sure:", "answers": {"vanilla": answer}},
            {"title": "second", "prompt": "why?", "prefill": None, "answers": {"derta": answer}},
        ],
        "provenance": {"seed": 0},
    }


def terminal(table, width=100):
    out = io.StringIO()
    Console(file=out, width=width).print(table)
    return out.getvalue()


def rendered(path, results, details):
    render_report(results, details, path)
    return path.read_text(encoding="utf-8")


class Page(HTMLParser):
    """The tags, attributes and text of a page, as a browser would see them."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.attributes, self.text = [], [], ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def html(tmp_path_factory):
    """The report with data in every section."""
    return rendered(tmp_path_factory.mktemp("report") / "report.html", results(), details())


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


# HTML


def test_the_report_is_one_page_that_loads_nothing(html):
    page = Page(html)
    assert not {"link", "img", "iframe", "object", "embed"} & set(page.tags)
    loaded = [value for name, value in page.attributes if name in ("src", "href", "xlink:href", "action")]
    assert loaded
    assert all(value.startswith("#") for value in loaded)
    assert "url(http" not in html
    assert "@import" not in html
    assert "default-src 'none'" in html


def test_the_report_shows_every_section_it_has_data_for(html):
    page = Page(html)
    assert page.tags.count("svg") == 3
    for text in [
        "How safe is it?",
        "One sentence.",
        "refusal-rule",
        "Wilson 95% intervals",
        "84–95",
        "Attack success",
        "Where refusals begin",
        "Ready to refuse",
        "Answers",
        "Provenance",
    ]:
        assert text in page.text


def test_sections_without_data_are_left_out(tmp_path):
    page = Page(rendered(tmp_path / "report.html", {"judge": results()["judge"], "models": {}}, {}))
    assert not {"svg", "table", "h2", "script"} & set(page.tags)
    scores = results()
    for model in scores["models"].values():
        del model["refusal_position"]
    page = Page(rendered(tmp_path / "report.html", scores, {"curves": {"harmful": {}}, "examples": []}))
    assert page.tags.count("svg") == page.tags.count("h2") == page.tags.count("table") == 1


def test_nothing_a_model_writes_can_run(tmp_path):
    scores, more = results(), details()
    scores["judge"] = {"name": HOSTILE, "version": HOSTILE}
    scores["models"][HOSTILE] = scores["models"].pop("derta")
    scores["models"]["rto"]["attacks"][HOSTILE] = attack_entry(1, 2)
    answer = {"tokens": [HOSTILE, '" onmouseover="alert(3)'], "p_refusal": [0.1, 0.2], "verdict": HOSTILE}
    example = {"title": HOSTILE, "prompt": HOSTILE, "prefill": HOSTILE, "answers": {HOSTILE: answer}}
    more.update(title=HOSTILE, summary=HOSTILE, provenance={HOSTILE: HOSTILE})
    more["examples"] += [example]
    more["curves"]["harmful"][HOSTILE] = curve(0.5)
    more["refusal_positions"][HOSTILE] = {"positions": [3], "n": 5}

    page = Page(rendered(tmp_path / "report.html", scores, more))
    assert page.tags.count("script") == 1
    assert "img" not in page.tags
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert page.text.count(HOSTILE) >= 15


def test_ids_are_unique_and_references_resolve(html):
    ids = re.findall(r'\sid="([^"]+)"', html)
    assert len(ids) == len(set(ids)) > 100
    used = re.findall(r'href="#([^"]+)"', html) + re.findall(r"url\(#([^)]+)\)", html)
    assert used
    assert set(used) <= set(ids)


def test_every_token_carries_its_probability_of_a_refusal(html):
    assert '<span style="--p:0.875" title="p(refusal) = 0.875">Sorry</span>' in html
    assert '<span style="--p:0.000" title="p(refusal) = 0.000"> &lt;b&gt;</span>' in html


def test_examples_can_be_read_without_javascript(html):
    page = Page(html)
    assert "hidden" not in [name for name, _ in page.attributes]
    assert ("href", "#example-2") in page.attributes
    assert ("id", "example-2") in page.attributes


def test_tokens_and_probabilities_must_pair_up(tmp_path):
    more = details()
    more["examples"][0]["answers"]["vanilla"] = {"tokens": ["a", "b"], "p_refusal": [0.5], "verdict": "safe"}
    with pytest.raises(ValueError, match="example 'first', vanilla: 2 tokens but 1 values of p_refusal"):
        render_report(results(), more, tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_the_best_of_each_column_is_highlighted(html):
    assert len(re.findall(r'<td class="[^"]*best"', html)) == len(ATTACKS) + 1


# figures


def test_a_method_has_one_colour_in_every_figure():
    colours = figures.palette(["vanilla", "derta", "vanilla"])
    assert list(colours) == ["vanilla", "derta"]
    for svg in (
        figures.attack_success({name: results()["models"][name] for name in colours}, colours),
        figures.refusal_position_cdf({name: {"positions": [2], "n": 4} for name in colours}, colours),
        figures.refusal_curves({"harmful": {name: curve(0.3) for name in colours}}, colours),
    ):
        assert all(colour.lower() in svg for colour in colours.values())


def test_figures_are_reproducible_svg_with_text_left_as_text():
    models = results()["models"]
    first, second = (figures.attack_success(models, figures.palette(models)) for _ in range(2))
    assert first == second
    assert first.startswith("<svg")
    assert first.endswith("</svg>")
    assert ">prefill-5</text>" in first


def test_the_cdf_ends_at_the_refused_share():
    svg = figures.refusal_position_cdf({"derta": {"positions": [1, 4, 200], "n": 4}}, {"derta": "#000000"})
    assert "derta (75.0% refuse)" in svg


def test_names_with_dollars_are_not_formulas():
    name = "a$_b$c"
    svg = figures.attack_success({name: {"attacks": {"$x^": attack_entry(1, 2)}}}, figures.palette([name]))
    assert f">{name}</text>" in svg
    assert ">$x^</text>" in svg
