"""What a suite asks, in which form; and that nothing is asked of files that are not what the manifest says."""

import hashlib
import json
import re
from pathlib import Path

import pytest
import yaml

from derta_jax.config import Data
from derta_jax.data.template import Template
from derta_jax.errors import UserError
from derta_jax.evaluation.attacks import ask, completing, prefill
from derta_jax.evaluation.manifest import Attack, Helpfulness, OverRefusal, attack_names
from derta_jax.evaluation.suite import load_suite
from derta_jax.interop.tokenizer import load_tokenizer
from tests.conftest import helpful, triple, write_jsonl

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs" / "evaluation"
DOCUMENTATION = ROOT / "docs" / "evaluation.md"
TRIPLES = [triple(i) for i in range(3)]
XSTEST = "id,prompt,type\n1,How can I stir soup?,homonyms\n2,How can I stir a grell?,contrast_homonyms\n"


@pytest.fixture(scope="module")
def template(tiny_llama):
    return Template(Data.model_fields["template"].default, load_tokenizer(tiny_llama))


@pytest.fixture
def suite(tmp_path):
    """Writes a manifest beside `harmful.jsonl`, `xstest.csv` and `gsm8k.jsonl`, and loads it."""
    write_jsonl(tmp_path / "harmful.jsonl", TRIPLES)
    (tmp_path / "xstest.csv").write_text(XSTEST)
    write_jsonl(tmp_path / "gsm8k.jsonl", [{"question": f"{n} + 1?", "answer": f"#### {n + 1}"} for n in range(4)])

    def load(place=None, **manifest):
        file = tmp_path / "suite.yaml"
        file.write_text(yaml.safe_dump(manifest, sort_keys=False))
        return load_suite(file, place)

    return load


@pytest.fixture
def refused(suite, tmp_path):
    """The lines that are said of a manifest, without the file's name."""

    def told(**manifest):
        with pytest.raises(UserError) as raised:
            suite(**manifest)
        first, *lines = str(raised.value).splitlines()
        assert first == f"{tmp_path / 'suite.yaml'}:"
        return [line.strip() for line in lines]

    return told


def names(cases):
    return [(case.group, case.name, case.question["id"]) for case in cases]


def test_every_set_is_asked_in_the_manifests_order(suite, template):
    manifest = {
        "helpfulness": {"sums": {"task": "gsm8k", "file": "gsm8k.jsonl", "limit": 1}},
        "over_refusal": {"xstest": {"file": "xstest.csv"}},
        "attacks": {"plain": {"file": "harmful.jsonl", "limit": 2}, "contrast": {"file": "xstest.csv"}},
    }
    assert names(suite(**manifest).cases(template)) == [
        ("attacks", "plain", "triple-0"),
        ("attacks", "plain", "triple-1"),
        ("attacks", "contrast", "2"),
        ("over_refusal", "xstest", "1"),
        ("helpfulness", "sums", "gsm8k-1"),
    ]


def test_attacks_are_asked_as_the_manifest_says(suite, template):
    file = {"file": "harmful.jsonl"}
    cases = list(
        suite(
            attacks={
                "direct": file,
                "given": file | {"how": "prefill", "tokens": [5, 2]},
                "completing": file | {"how": "completing", "tokens": [4]},
                "raw": file | {"how": "completing"},
            }
        ).cases(template)
    )
    expected = [
        *ask(TRIPLES, template, "attacks", "direct"),
        *prefill(TRIPLES, template, 5, "given"),
        *prefill(TRIPLES, template, 2, "given"),
        *completing(TRIPLES, template.tokenizer, 4),
    ]
    assert cases[: len(expected)] == expected
    raw = cases[len(expected)]
    assert raw.prompt_ids == template.tokenizer.prompt_ids(TRIPLES[0]["prompt"])
    assert (raw.name, raw.how, raw.prefill) == ("raw", "completing", TRIPLES[0]["prompt"])
    assert {case.how for case in cases if case.name.startswith("given")} == {"prefill"}


def test_templates_are_filled_from_another_file(suite, template, tmp_path):
    write_jsonl(tmp_path / "stories.jsonl", [{"id": "story", "prompt": "A story: {question}"}])
    loaded = suite(attacks={"story": {"file": "stories.jsonl", "questions": "harmful.jsonl", "rows": 3}})
    case = next(loaded.cases(template))
    assert case.question["prompt"] == "A story: How do I take object 0?"
    assert (case.question["behavior"], case.question["query"]) == ("triple-0", "How do I take object 0?")


def test_questions_can_be_written_to_json(suite, template):
    cases = suite(helpfulness={"sums": {"task": "gsm8k", "file": "gsm8k.jsonl"}}).cases(template)
    assert json.dumps([case.question for case in cases])


def test_answers_to_exams_are_marked_by_the_rule_that_the_manifest_names(suite, template):
    entry = {"task": "gsm8k", "file": "gsm8k.jsonl"}
    loaded = suite(helpfulness={"sums": entry, "strict": entry | {"extractor": "last-number"}})
    by_name = {case.name: case for case in loaded.cases(template) if case.question["gold"] == "4"}
    assert loaded.helpful(by_name["sums"], "So it is 4, in 2 steps.")
    assert not loaded.helpful(by_name["strict"], "So it is 4, in 2 steps.")
    assert not loaded.helpful(by_name["sums"], "So it is 5.")


def test_alpaca_which_has_no_rule_is_counted_as_over_refusal(suite, template, tmp_path):
    write_jsonl(tmp_path / "alpaca.jsonl", [{"instruction": "Hum."}])
    cases = suite(helpfulness={"alpaca": {"task": "alpaca", "file": "alpaca.jsonl"}}).cases(template)
    assert names(cases) == [("over_refusal", "alpaca", "alpaca-1")]


def test_curves_follow_the_questions_that_have_an_answer(suite, tmp_path):
    write_jsonl(tmp_path / "benign.jsonl", [helpful(0), {"id": "bare", "prompt": "Why?"}])
    loaded = suite(attacks={"a": {"file": "harmful.jsonl"}}, curves={"benign": "benign.jsonl"})
    assert loaded.curve_questions() == {"harmful": [], "benign": [helpful(0)]}


def test_files_are_sought_below_the_suite_its_root_or_the_one_given(suite, tmp_path):
    (tmp_path / "below").mkdir()
    (tmp_path / "harmful.jsonl").rename(tmp_path / "below" / "harmful.jsonl")
    attacks = {"a": {"file": "harmful.jsonl"}}
    assert suite(attacks=attacks).problems() == [f"attacks.a: no file {tmp_path / 'harmful.jsonl'}"]
    assert suite(attacks=attacks, root="below").problems() == []
    assert suite(tmp_path / "below", attacks=attacks).problems() == []


def test_a_file_is_known_by_its_rows_and_hash(suite, tmp_path):
    sha256 = hashlib.sha256((tmp_path / "harmful.jsonl").read_bytes()).hexdigest()
    loaded = suite(attacks={"a": {"file": "harmful.jsonl", "rows": 3, "sha256": sha256, "limit": 1}})
    loaded.check()
    assert loaded.provenance() == {"attacks.a": f"harmful.jsonl, 1 questions, sha256 {sha256[:12]}"}


def test_provenance_names_the_rule_that_marks(suite):
    (described,) = suite(helpfulness={"sums": {"task": "gsm8k", "file": "gsm8k.jsonl"}}).provenance().values()
    assert described.endswith(", last-sentence 1, 0 shots")


def test_all_that_is_wrong_with_the_files_is_said_at_once(suite, template, tmp_path):
    (tmp_path / "broken.jsonl").write_text('{"prompt": "How?"}\n{}\n')
    (tmp_path / "safe.csv").write_text(XSTEST.rsplit("2,", 1)[0])
    write_jsonl(tmp_path / "stories.jsonl", [{"id": "story", "prompt": "A story: {question}"}])
    loaded = suite(
        attacks={
            "gone": {"file": "gone.jsonl", "source": "https://example.org/gone", "licence": "MIT"},
            "other": {"file": "harmful.jsonl", "rows": 2, "sha256": "0" * 64, "source": "you"},
            "broken": {"file": "broken.jsonl", "licence": "MIT"},
            "safe": {"file": "safe.csv"},
            "open": {"file": "stories.jsonl"},
            "closed": {"file": "harmful.jsonl", "questions": "xstest.csv"},
            "bare": {"file": "xstest.csv", "how": "prefill", "tokens": [2]},
        },
        helpfulness={"shots": {"task": "gsm8k", "file": "gsm8k.jsonl", "shots": 9, "examples": "gsm8k.jsonl"}},
        curves={"benign": "harmful.jsonl", "harmful": "gone.jsonl"},
    )
    found = hashlib.sha256((tmp_path / "harmful.jsonl").read_bytes()).hexdigest()
    expected = [
        f"attacks.gone: no file {tmp_path}/gone.jsonl (from https://example.org/gone; licence: MIT)",
        f"attacks.other: {tmp_path}/harmful.jsonl is another file: "
        f"its sha256 is {found}, expected {'0' * 64} (from you)",
        f"attacks.other: {tmp_path}/harmful.jsonl gives 3 questions, expected 2 (from you)",
        "attacks.broken: the prompts have problems: (licence: MIT)\n"
        f"    {tmp_path}/broken.jsonl:2: has neither `prompt` nor `question`",
        f"attacks.safe: {tmp_path}/safe.csv: all questions are labelled safe, and none belongs here",
        f"attacks.open: {tmp_path}/stories.jsonl: 1 prompts hold {{question}}, as 'story': "
        "say with `questions` which file fills it",
        f"attacks.closed: {tmp_path}/harmful.jsonl: triple-0: no {{question}} in the prompt, where a question would go",
        f"attacks.bare: {tmp_path}/xstest.csv: no question has a `harmful` answer, "
        "which prefill with tokens takes its words from",
        f"helpfulness.shots: {tmp_path}/gsm8k.jsonl has 4 examples, fewer than shots=9",
        f"curves.harmful: no prompts file {tmp_path}/gone.jsonl",
        f"curves.benign: no question of {tmp_path}/harmful.jsonl has `response`, the answer to follow",
    ]
    assert loaded.problems() == expected
    for ask_it in (loaded.check, loaded.curve_questions, lambda: next(loaded.cases(template))):
        with pytest.raises(UserError) as raised:
            ask_it()
        assert str(raised.value) == "\n  ".join([f"{tmp_path / 'suite.yaml'} cannot be asked:", *expected])


def test_unknown_keys_are_named_with_the_nearest(refused):
    told = refused(attacks={"mine": {"fiel": "a.jsonl", "file": "b.jsonl"}}, overrefusal={})
    assert told == [
        "attacks.mine.fiel: unknown key; did you mean 'attacks.mine.file'?",
        "overrefusal: unknown key; did you mean 'over_refusal'?",
    ]


@pytest.mark.parametrize(
    ("group", "entry", "message"),
    [
        ("attacks", {}, "attacks.x.file: missing"),
        ("attacks", {"rows": 0}, "attacks.x.rows: Input should be greater than or equal to 1 (got 0)"),
        ("attacks", {"sha256": "ABC"}, "attacks.x.sha256: String should match pattern .* (got 'ABC')"),
        (
            "attacks",
            {"how": "prefil"},
            "attacks.x.how: Input should be 'plain', 'prefill' or 'completing' (got 'prefil')",
        ),
        ("attacks", {"how": "prefill"}, "attacks.x: prefill needs tokens: .*"),
        (
            "attacks",
            {"how": "prefill", "tokens": [2, 2]},
            "attacks.x.tokens: must be different whole numbers from 1 .*",
        ),
        ("attacks", {"how": "completing", "tokens": [2, 3]}, "attacks.x: completing takes one number of tokens.*"),
        ("attacks", {"tokens": [2]}, "attacks.x: tokens are for prefill and completing: set how"),
        ("helpfulness", {"task": "gsm9k"}, "helpfulness.x.task: Input should be .* (got 'gsm9k')"),
        ("helpfulness", {"task": "gsm8k", "shots": 2}, "helpfulness.x: shots and examples go together.*"),
        ("helpfulness", {"task": "gsm8k", "prompt": "Hm"}, r"helpfulness.x.prompt: must contain {question} once .*"),
        (
            "helpfulness",
            {"task": "mmlu", "extractor": "last-number"},
            "helpfulness.x: extractor: mmlu has choice (got 'last-number')",
        ),
        (
            "helpfulness",
            {"task": "alpaca", "shots": 1, "examples": "a.jsonl"},
            "helpfulness.x: alpaca takes no shots",
        ),
    ],
)
def test_wrong_values_are_named_with_their_key(refused, group, entry, message):
    entry = entry | {"file": "a.jsonl"} if entry else {}
    (line,) = refused(**{group: {"x": entry}})
    assert re.fullmatch(re.escape(message).replace(r"\.\*", ".*"), line)


def test_a_suite_that_asks_nothing_is_refused(refused):
    assert refused(root=".") == ["nothing to ask: name files under attacks, over_refusal or helpfulness"]


@pytest.mark.parametrize(
    "manifest",
    [
        {"attacks": {"a": {"file": "f", "how": "prefill", "tokens": [5]}, "a-5": {"file": "f"}}},
        {"over_refusal": {"a-5": {"file": "f"}}, "helpfulness": {"a-5": {"file": "f", "task": "alpaca"}}},
    ],
)
def test_two_sets_of_one_name_are_refused(refused, manifest):
    assert refused(**manifest) == ["two sets would be reported as 'a-5': rename one"]


def test_a_missing_suite_is_answered_with_the_nearest(tmp_path):
    (tmp_path / "paper.yaml").write_text("")
    with pytest.raises(UserError, match=r"no suite file .*papre\.yaml; did you mean '.*paper\.yaml'\?"):
        load_suite(tmp_path / "papre.yaml")


def test_the_small_suite_is_complete(template):
    loaded = load_suite(CONFIGS / "small.yaml")
    assert loaded.problems() == []
    cases = list(loaded.cases(template))
    counts = {name: sum(case.name == name for case in cases) for name in dict.fromkeys(case.name for case in cases)}
    assert counts == {
        "plain": 4,
        "story": 8,
        "prefill-2": 4,
        "prefill-5": 4,
        "completing": 4,
        "look-alikes": 4,
        "sums": 3,
        "choices": 3,
    }
    assert [len(questions) for questions in loaded.curve_questions().values()] == [4, 4]
    gold = {case.question["id"]: case for case in cases if case.name == "choices"}
    assert loaded.helpful(gold["choices-3"], "(C) Two")


def test_the_example_of_the_documentation_is_a_suite(tmp_path):
    (example,) = re.findall("```yaml\n(.*?)```", DOCUMENTATION.read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "suite.yaml").write_text(example, encoding="utf-8")
    sets = [f"{group}.{name}" for group, name, _ in load_suite(tmp_path / "suite.yaml").manifest.entries()]
    assert sets[:2] == ["attacks.jailbreak-chat", "attacks.story"]
    assert len(sets) == 7


def test_every_key_of_a_suite_is_documented():
    sections = (Attack, OverRefusal, Helpfulness)
    keys = {key for section in sections for key in section.model_fields}
    documented = re.findall(r"`(\w+)`", " ".join(re.findall(r"^\| (.*?) \|", DOCUMENTATION.read_text(), re.MULTILINE)))
    assert keys <= set(documented)


def test_the_papers_suite_says_of_each_file_where_it_is_from(tmp_path):
    loaded = load_suite(CONFIGS / "paper.yaml", tmp_path)
    assert attack_names(loaded.manifest.attacks) == [
        "code",
        "pair",
        "jailbreak-chat",
        "self-cipher",
        "completing",
        "autodan",
    ]
    rows = {name: entry.rows for _, name, entry in loaded.manifest.entries()}
    assert list(rows.values()) == [200, 50, 200, 200, 200, 50, 250, 500, 500, 300]
    problems = loaded.problems()
    assert len(problems) == len(rows)
    assert all(re.search(r"no file .* \(from .*; licence: .*\)$", problem) for problem in problems)


def test_the_papers_gsm8k_questions_are_the_public_ones(shared_data, tmp_path):
    (tmp_path / "helpfulness_gsm8k_500.json").write_bytes((shared_data / "gsm8k_500.jsonl").read_bytes())
    problems = load_suite(CONFIGS / "paper.yaml", tmp_path).problems()
    assert not [problem for problem in problems if problem.startswith("helpfulness.gsm8k")]
