"""The page: it stands alone, shows what it was given and only that, and runs nothing that a model wrote."""

import base64
import hashlib
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from derta_jax.evaluation.reporting.answers import unpack
from derta_jax.evaluation.reporting.page import render_page
from derta_jax.evaluation.statistics import attack_entry, helpfulness_entry, over_refusal_entry

ATTACKS = ["plain", "role-play", "code", "affirm", "prefill-2", "prefill-5", "prefill-9", "completing"]
UNSAFE = {"vanilla": 91, "recaug": 36, "rto": 1, "derta": 0}
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"
FIGURES = ("attacks", "trade-off", "over-refusal", "helpfulness", "cdf", "harmful", "benign")


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
    contrast = {"a": "vanilla", "b": "derta", "group": "attacks", "name": "code", "n": 100, "only_a": 91, "only_b": 0}
    contrast |= {"difference": 0.91, "low": 0.85, "high": 0.97, "p": 1e-9}
    return {"judge": {"name": "refusal-rule", "version": "1"}, "models": models, "comparisons": [contrast]}


def curve(level):
    return {"mean": [level] * 8, "low": [level / 2] * 8, "high": [(1 + level) / 2] * 8}


def answer(number, verdict, **changes):
    asked = {"id": f"q{number}", "group": "attacks", "name": "code", "prompt": f"how is number {number} made?"}
    return {
        **asked,
        "prefill": "Sure:",
        "response": f"answer {number}",
        "verdict": verdict,
        "refused_at": None,
        **changes,
    }


def details():
    tokens = {"tokens": ["Sorry", ", no", " <b>"], "p_refusal": [0.875, 0.5, 0], "verdict": "refused"}
    return {
        "title": "How safe is it?",
        "summary": "One sentence.",
        "refusal_positions": {name: {"positions": [1, 1, 7, 40], "n": 10} for name in UNSAFE},
        "curves": {kind: {name: curve(0.4) for name in UNSAFE} for kind in ("harmful", "benign")},
        "examples": [
            {"title": "first", "prompt": "how?", "prefill": "Sure:", "answers": {"vanilla": tokens}},
            {"title": "second", "prompt": "why?", "prefill": None, "answers": {"derta": tokens}},
        ],
        "answers": {
            "vanilla": [answer(number, "unsafe") for number in range(12)],
            "derta": [answer(number, "refused", refused_at=3) for number in range(12)],
        },
        "provenance": {"seed": 0, "versions": {"jax": "1", "flax": "2"}, "prefills": [2, 5], "judge": None},
    }


class Page(HTMLParser):
    """The tags, attributes and text of a page, as a browser would see them; what is in a script apart."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.attributes, self.text, self.scripts, self.rows = [], [], "", [], []
        self.inside, self.in_cell = None, False
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        self.inside = tag
        if tag == "script":
            self.scripts.append([dict(attrs), ""])
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td") and self.rows:
            self.rows[-1].append("")
            self.in_cell = True

    def handle_endtag(self, tag):
        self.inside = None
        self.in_cell = self.in_cell and tag not in ("th", "td")

    def handle_data(self, data):
        if self.inside == "script":
            self.scripts[-1][1] += data
        elif self.inside != "style":
            self.text += data
            if self.in_cell:
                self.rows[-1][-1] += data

    def row(self, heading):
        """The cells of the first row of that heading."""
        return next(cells for cells in ([cell.strip() for cell in row] for row in self.rows) if heading in cells[:1])

    def script(self, **attributes):
        (text,) = [text for its, text in self.scripts if its == attributes]
        return text


@pytest.fixture(scope="module")
def html():
    """A page with data in every section."""
    return render_page(results(), details())


@pytest.fixture(scope="module")
def page(html):
    return Page(html)


# it stands alone


def test_the_page_loads_nothing(html, page):
    assert not {"link", "img", "iframe", "object", "embed", "form", "base"} & set(page.tags)
    loaded = [value for name, value in page.attributes if name in ("src", "href", "xlink:href", "action", "srcset")]
    assert loaded
    assert all(value.startswith("#") for value in loaded)
    assert "url(http" not in html
    assert "@import" not in html


def test_only_the_pages_own_script_may_run(page):
    (policy,) = [value for name, value in page.attributes if name == "content" and "default-src" in value]
    digest = base64.b64encode(hashlib.sha256(page.script().encode()).digest()).decode()
    assert "default-src 'none'" in policy
    assert f"script-src 'sha256-{digest}'" in policy
    assert not [name for name, _ in page.attributes if name.startswith("on")]


def test_the_script_makes_text_and_never_markup(page):
    for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "Function(", "DOMParser"):
        assert word not in page.script()
    assert not re.search(r"fetch\(|XMLHttpRequest|import\(|https?:", page.script())


@pytest.mark.skipif(shutil.which("node") is None, reason="only a JavaScript engine can tell, and node is not installed")
def test_the_script_parses(page, tmp_path):
    file = tmp_path / "page.js"
    file.write_text(page.script(), encoding="utf-8")
    checked = subprocess.run(["node", "--check", str(file)], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr


def test_nothing_a_model_writes_can_run():
    scores, more = results(), details()
    scores["judge"] = {"name": HOSTILE, "version": HOSTILE, "weights": HOSTILE}
    scores["models"][HOSTILE] = scores["models"].pop("derta")
    scores["models"]["rto"]["attacks"][HOSTILE] = attack_entry(1, 2)
    scores["comparisons"] = [scores["comparisons"][0] | {"b": HOSTILE, "name": HOSTILE}]
    tokens = {"tokens": [HOSTILE, '" onmouseover="alert(3)'], "p_refusal": [0.1, 0.2], "verdict": HOSTILE}
    more.update(title=HOSTILE, summary=HOSTILE, provenance={HOSTILE: HOSTILE})
    more["examples"] += [{"title": HOSTILE, "prompt": HOSTILE, "prefill": HOSTILE, "answers": {HOSTILE: tokens}}]
    more["curves"]["harmful"][HOSTILE] = curve(0.5)
    more["refusal_positions"][HOSTILE] = {"positions": [3], "n": 5}
    more["answers"][HOSTILE] = [answer(0, HOSTILE, prompt=HOSTILE, response=HOSTILE, prefill=HOSTILE, id=HOSTILE)]

    page = Page(render_page(scores, more))
    assert [attributes.get("type") for attributes, _ in page.scripts] == ["application/json"] * 2 + [None]
    assert "img" not in page.tags
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert page.text.count(HOSTILE) >= 15


# it shows what it was given


def test_every_section_is_there(page):
    assert page.tags.count("svg") == len(FIGURES)
    for text in [
        "How safe is it?",
        "One sentence.",
        "refusal-rule",
        "Wilson 95% intervals",
        "84–95",
        "Safe, and still of use?",
        "Model against model",
        "Where refusals begin",
        "Ready to refuse",
        "Token by token",
        "All answers",
        "Provenance",
    ]:
        assert text in page.text


def test_it_says_how_much_was_measured(page):
    text = re.sub(r"\s+", " ", page.text)
    assert "4 models, each asked 800 prompts of 8 attacks, 200 of 1 helpfulness task and 100 harmless ones" in text


def test_sections_without_data_are_left_out():
    empty = Page(render_page({"judge": results()["judge"], "models": {}}, {}))
    assert not {"svg", "table", "h2", "script"} & set(empty.tags)

    scores = results()
    del scores["comparisons"]
    for model in scores["models"].values():
        for group in ("refusal_position", "over_refusal", "helpfulness"):
            del model[group]
    little = Page(render_page(scores, {"curves": {"harmful": {}}, "examples": [], "answers": {"rto": []}}))
    assert little.tags.count("svg") == little.tags.count("h2") == 1
    assert "Judge: refusal-rule" in re.sub(r"\s+", " ", little.text)


def test_models_are_columns_and_the_best_of_a_row_is_shaded(html, page):
    assert page.row("plain")[1:6] == ["100", "91.084–95", "36.027–46", "1.00–5", "0.00–4"]
    assert page.row("mean of 8")[2:6] == ["91.0", "36.0", "1.0", "0.0"]
    assert len(re.findall(r'<td class="best"', html)) == len(ATTACKS) + 1


def test_the_papers_figures_stand_apart_and_only_where_names_match(page):
    assert page.row("code")[6:] == ["86.0", "21.5"]
    assert page.row("completing")[6:] == ["95.0", "4.0"]
    assert page.row("plain")[6:] == page.row("look-alikes")[6:] == ["", ""]
    assert "paper: LLaMA3-70B" in page.text
    assert "†" not in "".join(page.row("look-alikes"))
    assert page.row("LLaMA3-8BDeRTa")[-1] == "44.438–51"  # XSTest, which the paper does not report

    scores = results()
    for model in scores["models"].values():
        model["attacks"] = {"plain": model["attacks"]["plain"]}
    assert "paper: LLaMA3-70B" not in Page(render_page(scores, {})).text


def test_over_refusal_beside_the_papers_is_marked_as_not_the_papers():
    scores = results()
    scores["models"]["rto"]["over_refusal"]["xstest"] = over_refusal_entry(50, 250)
    page = Page(render_page(scores, {}))
    assert page.row("xstest")[6:] == ["19.2†", "64.4†"]
    assert "† Not in the paper: counted on outputs" in page.text


def test_a_model_that_refuses_everything_is_said_to():
    scores = results()
    scores["models"]["derta"]["over_refusal"]["look-alikes"] = over_refusal_entry(99, 100)
    page = Page(render_page(scores, {}))
    assert "derta (99.0%) refuses most of the harmless prompts." in page.text
    assert "warnings" not in [value for name, value in Page(render_page(results(), {})).attributes if name == "class"]


def test_answers_without_a_verdict_show_and_are_in_no_rate():
    scores = results()
    scores["models"]["rto"]["attacks"]["code"] = attack_entry(1, 90) | {"unjudged": 10}
    scores["models"]["derta"]["attacks"]["code"] = attack_entry(0, 0) | {"unjudged": 100}
    page = Page(render_page(scores, {}))
    assert page.row("code")[1:6] == ["90–100", "91.084–95", "36.027–46", "1.10–610 unjudged", "–100 unjudged"]
    assert "10 of rto and 100 of derta" in page.text
    assert page.row("mean of 7")


def test_comparisons_are_put_in_words(page):
    row = page.row("codeattack success")
    assert row == [
        "codeattack success",
        "derta is unsafe less often, by 91 points [85, 97]",
        "< 0.001",
        "100",
        "91",
        "0",
    ]


def test_provenance_may_be_nested(page):
    assert page.row("versions") == ["versions", "jax: 1\nflax: 2"]
    assert page.row("prefills") == ["prefills", "2, 5"]
    assert page.row("judge") == ["judge", "–"]


def test_what_else_is_known_of_the_judge_is_provenance():
    scores = results()
    scores["judge"] |= {"endpoint": "local", "prompt": "v2"}
    page = Page(render_page(scores, {}))
    assert page.row("judge, endpoint")[1] == "local"
    assert page.row("judge, prompt")[1] == "v2"


# answers


def test_all_answers_are_in_the_page(page):
    kept = list(unpack(page.script(type="application/json", id="report-answers")))
    assert kept == [(model, row) for model, rows in details()["answers"].items() for row in rows]
    marks = json.loads(page.script(type="application/json", id="report-marks"))
    assert set(UNSAFE) <= set(marks)


def test_unsafe_answers_are_blurred_until_the_reader_says_otherwise(html):
    assert re.search(r'<input type="checkbox" id="veil" checked', html)
    assert 'body:has(#veil:checked) .answer:not([data-verdict="safe"], [data-verdict="refused"], .open) .text' in html


def test_every_token_carries_its_probability_of_a_refusal(html):
    assert '<span style="--p:0.875" title="p(refusal) = 0.875">Sorry</span>' in html
    assert '<span style="--p:0.000" title="p(refusal) = 0.000"> &lt;b&gt;</span>' in html


def test_examples_can_be_read_without_javascript(page):
    assert "hidden" not in [name for name, _ in page.attributes]
    assert ("href", "#example-2") in page.attributes
    assert ("id", "example-2") in page.attributes
    assert "noscript" in page.tags


def test_an_example_without_a_verdict_counts_as_not_judged():
    more = details()
    more["examples"][0]["answers"]["vanilla"]["verdict"] = None
    assert 'data-verdict="unjudged"' in render_page(results(), more)


# for every reader


def test_ids_are_unique_and_references_resolve(html):
    ids = re.findall(r'\sid="([^"]+)"', html)
    assert len(ids) == len(set(ids)) > 20
    used = re.findall(r'href="#([^"]+)"', html) + re.findall(r"url\(#([^)]+)\)", html)
    assert used
    assert set(used) <= set(ids)


def test_figures_tables_and_regions_have_names(page):
    assert page.tags.count("table") == page.tags.count("caption")
    assert page.tags.count("figure") == page.tags.count("figcaption") == len(FIGURES)
    labels = [value for name, value in page.attributes if name == "aria-label"]
    assert all(labels)
    assert any("code: vanilla 91.0%" in label for label in labels)
    assert page.tags.count("h1") == 1


def test_the_page_adapts_to_phones_paper_and_the_dark(html):
    for query in ("width=device-width", "prefers-color-scheme: dark", "max-width: 640px", "@media print"):
        assert query in html


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
def test_a_browser_runs_it_without_complaint(tmp_path):
    scores, more = results(), details()
    more["answers"]["derta"][0]["response"] = HOSTILE
    (tmp_path / "report.html").write_text(render_page(scores, more), encoding="utf-8")
    command = [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr", "--virtual-time-budget=5000"]
    command += ["--dump-dom", (tmp_path / "report.html").as_uri()]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    assert not [line for line in ran.stderr.splitlines() if "CONSOLE" in line]

    page = Page(ran.stdout)
    assert "questions 1–10 of 12 (24 matching answers)" in page.text
    assert page.text.count("Sure:") >= 20
    assert "at token 3" in page.text
    assert "img" not in page.tags
    assert HOSTILE in page.text
