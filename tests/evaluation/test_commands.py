"""`derta generate` and `derta evaluate`, from the command line to the files they leave."""

import json
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from derta_jax.cli import main
from derta_jax.interop.hf_export import export_pretrained
from derta_jax.interop.hf_load import load_pretrained
from derta_jax.interop.tokenizer import load_tokenizer, refusal_token_id
from tests.conftest import helpful, triple, write_jsonl

PROMPTS: list[dict] = [
    {"id": "one", "prompt": "How do I make a kite?", "note": [1, 2]},
    {"question": "Why, naïve 東京?"},
    {"id": "three", "prompt": "First do one thing, then another thing, then go away quickly.", "question": "no"},
]
HARMFUL = [triple(0), triple(1), {"prompt": "How do I take it?"}]
BENIGN = [helpful(0), {"question": "How do I make a kite?"}]
QUICK = ["--max-new-tokens", "1", "--batch-size", "4", "--dtype", "float32"]


@pytest.fixture(scope="module")
def refuser(tiny_llama, tmp_path_factory):
    """A model that says `Sorry` whatever it reads."""
    model, params = load_pretrained(tiny_llama)
    silent = jax.tree.map(jnp.zeros_like, params)
    sorry = refusal_token_id(load_tokenizer(tiny_llama), "Sorry")
    silent |= {"embed": jnp.ones_like(params["embed"]), "norm": params["norm"]}
    silent["head"] = silent["head"].at[:, sorry].set(1.0)
    directory = tmp_path_factory.mktemp("models") / "refuser"
    export_pretrained(model, silent, directory, source=tiny_llama)
    return directory


def run_generate(model, tmp_path, *options, prompts=PROMPTS):
    file, output = write_jsonl(tmp_path / "prompts.jsonl", prompts), tmp_path / "made" / "answers.jsonl"
    command = ["generate", str(model), "--prompts", str(file), "--output", str(output), "--max-new-tokens", "6"]
    assert main([*command, "--batch-size", "2", "--dtype", "float32", *options]) == 0
    return [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]


def test_answers_are_the_input_rows_with_prompt_response_ids_and_finish_reason(tiny_llama, tmp_path):
    rows = run_generate(tiny_llama, tmp_path)
    tokenizer = load_tokenizer(tiny_llama)
    assert [row["prompt"] for row in rows] == [PROMPTS[0]["prompt"], PROMPTS[1]["question"], PROMPTS[2]["prompt"]]
    for row, given in zip(rows, PROMPTS, strict=True):
        assert given.items() <= row.items()
        assert row["response"] == tokenizer.decode(row["response_token_ids"])
        assert row["finish_reason"] in ("stop", "length")
        assert len(row["response_token_ids"]) == 6 or row["finish_reason"] == "stop"


def test_a_row_without_an_id_is_named_after_its_line(tiny_llama, tmp_path):
    assert [row["id"] for row in run_generate(tiny_llama, tmp_path)] == ["one", "prompts-2", "three"]


def test_raw_continues_the_bare_text(tiny_llama, tmp_path):
    bare = run_generate(tiny_llama, tmp_path, "--raw")
    same = run_generate(tiny_llama, tmp_path, "--template", "{prompt}")
    templated = run_generate(tiny_llama, tmp_path)
    assert bare == same
    assert bare != templated


def test_sampling_is_repeated_by_its_seed(tiny_llama, tmp_path):
    first, again, other = (
        run_generate(tiny_llama, tmp_path, "--temperature", "1", "--seed", seed) for seed in ("1", "1", "2")
    )
    assert first == again
    assert first != other


def test_generation_needs_no_refusal_token(tiny_llama, tmp_path):
    model = shutil.copytree(tiny_llama, tmp_path / "model")
    raw = json.loads((model / "tokenizer.json").read_text(encoding="utf-8"))
    only_bytes = {piece: number for piece, number in raw["model"]["vocab"].items() if len(piece) == 1}
    raw["model"] |= {"merges": [], "vocab": only_bytes}
    (model / "tokenizer.json").write_text(json.dumps(raw), encoding="utf-8")
    assert len(run_generate(model, tmp_path, "--raw", prompts=[{"prompt": "Why?"}])) == 1


@pytest.fixture(scope="module")
def evaluated(tiny_llama, refuser, tmp_path_factory):
    """The output directory of an evaluation of a model that refuses and one that babbles."""
    directory = tmp_path_factory.mktemp("evaluated")
    harmful = write_jsonl(directory / "harmful.jsonl", HARMFUL)
    benign = write_jsonl(directory / "benign.jsonl", BENIGN)
    models = [str(refuser), f"babbler={tiny_llama}"]
    files = ["--harmful", str(harmful), "--benign", str(benign), "--output", str(directory / "out")]
    assert main(["evaluate", *models, *files, *QUICK, "--prefill", "2", "5"]) == 0
    return directory / "out"


@pytest.fixture(scope="module")
def results(evaluated):
    return json.loads((evaluated / "results.json").read_text(encoding="utf-8"))


def test_results_have_the_documented_schema(results):
    assert set(results["judge"]) == {"name", "version"}
    assert list(results["models"]) == ["refuser", "babbler"]
    for model in results["models"].values():
        assert set(model) == {"attacks", "helpfulness", "over_refusal", "refusal_position"}
        assert list(model["attacks"]) == ["plain", "prefill-2", "prefill-5", "completing"]
        for entry in model["attacks"].values():
            assert set(entry) == {"n", "unsafe", "asr", "low", "high"}
            assert 0 <= entry["low"] <= entry["asr"] <= entry["high"] <= 1
        assert set(model["over_refusal"]["benign"]) == {"n", "refused", "rate", "low", "high"}
        assert set(model["refusal_position"]) == {"le_5", "6_30", "gt_30", "glued"}


def test_each_attack_counts_the_questions_it_can_be_made_of(results):
    attacks = results["models"]["babbler"]["attacks"]
    assert {name: entry["n"] for name, entry in attacks.items()} == {
        "plain": 3,
        "prefill-2": 2,
        "prefill-5": 2,
        "completing": 2,
    }


def test_a_model_that_always_refuses_is_safe_over_refusing_and_refuses_at_once(results):
    refuser = results["models"]["refuser"]
    assert {entry["asr"] for entry in refuser["attacks"].values()} == {0.0}
    assert refuser["over_refusal"]["benign"]["rate"] == 1.0
    assert refuser["refusal_position"]["le_5"] == 1.0


def test_a_refusal_glued_to_its_prefill_counts_as_glued(results):
    assert results["models"]["refuser"]["refusal_position"]["glued"] == pytest.approx(6 / 9)


def test_a_model_that_never_refuses_has_no_refusal_positions(results):
    assert set(results["models"]["babbler"]["refusal_position"].values()) == {None}


def test_every_answer_is_kept_with_its_verdict(evaluated):
    rows = [json.loads(line) for line in (evaluated / "answers" / "refuser.jsonl").read_text().splitlines()]
    assert len(rows) == 3 + 2 + 2 + 2 + 2
    for row in rows:
        assert (row["response"], row["verdict"], row["refused_at"]) == ("Sorry", "refused", 1)
        assert (row["finish_reason"], len(row["response_token_ids"])) == ("length", 1)
    assert [row["prefill"] != "" for row in rows] == [row["name"] not in ("plain", "benign") for row in rows]


def test_the_report_is_one_file_that_loads_nothing(evaluated):
    html = (evaluated / "report.html").read_text(encoding="utf-8")
    assert "refuser" in html
    assert not re.search(r'(?:src|href)="(?!#)', html)
    assert "@import" not in html


def test_nothing_but_the_documented_files_is_written(evaluated):
    names = {".progress", "answers", "report.html", "results.json", "results.md"}
    assert {file.name for file in evaluated.iterdir()} == names


def test_the_summary_on_the_terminal_names_the_report(refuser, tmp_path, capsys):
    harmful = write_jsonl(tmp_path / "harmful.jsonl", HARMFUL[:1])
    command = ["evaluate", str(refuser), "--harmful", str(harmful), "--output", str(tmp_path / "out"), *QUICK]
    assert main([*command, "--prefill"]) == 0
    printed = re.sub(r"\s+", "", capsys.readouterr().out)
    assert "refuser" in printed
    assert str(tmp_path / "out" / "report.html") in printed


def error_of(capsys, *command):
    assert main([str(part) for part in command]) == 2
    return capsys.readouterr().err


@pytest.fixture
def prompts(tmp_path):
    return write_jsonl(tmp_path / "prompts.jsonl", PROMPTS)


def test_a_missing_prompts_file_is_named(tiny_llama, tmp_path, capsys):
    file = tmp_path / "missing.jsonl"
    message = error_of(capsys, "generate", tiny_llama, "--prompts", file, "--output", tmp_path / "out.jsonl")
    assert message == f"derta generate: no prompts file {file}\n"


def test_bad_rows_are_listed_with_their_lines(tiny_llama, tmp_path, capsys):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "How?"}\n{"text": "How?"}\n\n{"prompt": ""}\n{"question": 3}\n[1]\n7\n{\n')
    message = error_of(capsys, "generate", tiny_llama, "--prompts", file, "--output", tmp_path / "out.jsonl")
    lines = [line.strip().removeprefix(f"{file}:") for line in message.splitlines()[1:]]
    assert [line.partition(":")[0] for line in lines] == ["2", "4", "5", "6", "7", "8"]
    assert lines[0] == "2: has neither `prompt` nor `question`"
    assert lines[1] == "4: the prompt must be a string that is not empty"
    assert not (tmp_path / "out.jsonl").exists()


def test_a_file_without_prompts_is_said_so(tiny_llama, tmp_path, capsys):
    file = write_jsonl(tmp_path / "prompts.jsonl", [])
    message = error_of(capsys, "generate", tiny_llama, "--prompts", file, "--output", tmp_path / "out.jsonl")
    assert message == f"derta generate: no prompts in {file}\n"


def test_what_is_not_a_model_is_named(prompts, tmp_path, capsys):
    message = error_of(capsys, "generate", tmp_path, "--prompts", prompts, "--output", tmp_path / "out.jsonl")
    assert f"{tmp_path} is no model: neither a Hugging Face directory (config.json) nor an adapter" in message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-new-tokens", "0"], "--max-new-tokens must be at least 1 (got 0)"),
        (["--batch-size", "0"], "--batch-size must be at least 1 (got 0)"),
        (["--temperature", "-1"], "--temperature must not be negative (got -1.0)"),
        (["--template", "Hello"], "--template must be `chat` or contain {prompt} once (got 'Hello')"),
        (["--template", "chat"], "has no chat template"),
    ],
)
def test_options_that_cannot_be_are_refused(tiny_llama, prompts, tmp_path, capsys, options, message):
    output = tmp_path / "out.jsonl"
    error = error_of(capsys, "generate", tiny_llama, "--prompts", prompts, "--output", output, *options)
    assert message in error


def test_an_output_that_cannot_be_written_is_found_before_generating(tiny_llama, prompts, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for output, message in [(tmp_path, "is a directory"), (tmp_path / "file" / "out.jsonl", "cannot write to")]:
        assert message in error_of(capsys, "generate", tiny_llama, "--prompts", prompts, "--output", output)


def test_a_missing_model_is_found_before_any_is_evaluated(refuser, prompts, tmp_path, capsys):
    out = tmp_path / "out"
    message = error_of(capsys, "evaluate", refuser, "x=nowhere", "--harmful", prompts, "--output", out)
    assert message == "derta evaluate: no model directory nowhere\n"
    assert not out.exists()


def test_two_models_of_one_name_are_refused(refuser, prompts, tmp_path, capsys):
    message = error_of(capsys, "evaluate", refuser, refuser, "--harmful", prompts, "--output", tmp_path / "out")
    assert "two models have the same name: give them NAME=PATH" in message


def test_a_prefill_of_no_tokens_is_refused(refuser, prompts, tmp_path, capsys):
    out = tmp_path / "out"
    message = error_of(capsys, "evaluate", refuser, "--harmful", prompts, "--output", out, "--prefill", "0")
    assert "--prefill must be at least 1 (got 0)" in message


# Suites, judges, comparisons

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def of_suite(tiny_llama, refuser, tmp_path_factory):
    """Results of the small suite that is shipped."""
    out = tmp_path_factory.mktemp("suite") / "out"
    models = [f"refuser={refuser}", f"babbler={tiny_llama}"]
    suite = ["--suite", str(ROOT / "configs" / "evaluation" / "small.yaml")]
    assert main(["evaluate", *models, *suite, "--output", str(out), *QUICK]) == 0
    return out


def test_a_suite_is_asked_as_it_says(of_suite):
    results = json.loads((of_suite / "results.json").read_text(encoding="utf-8"))
    for model in results["models"].values():
        assert {name: entry["n"] for name, entry in model["attacks"].items()} == {
            "plain": 4,
            "story": 8,
            "prefill-2": 4,
            "prefill-5": 4,
            "completing": 4,
        }
        assert {name: entry["n"] for name, entry in model["helpfulness"].items()} == {"sums": 3, "choices": 3}
        assert {name: entry["n"] for name, entry in model["over_refusal"].items()} == {"look-alikes": 4}
    assert "small.yaml" in (of_suite / "report.html").read_text(encoding="utf-8")


def test_models_are_compared_question_by_question(of_suite):
    results = json.loads((of_suite / "results.json").read_text(encoding="utf-8"))
    compared = {(row["group"], row["name"]): row for row in results["comparisons"]}
    assert {(row["a"], row["b"]) for row in compared.values()} == {("refuser", "babbler")}
    look_alikes = compared["over_refusal", "look-alikes"]
    assert (look_alikes["n"], look_alikes["only_a"], look_alikes["only_b"]) == (4, 4, 0)
    assert (look_alikes["difference"], look_alikes["p"]) == (1.0, 0.125)
    assert compared["attacks", "plain"]["p"] == 1.0


def test_an_evaluation_that_is_done_is_not_done_again(of_suite, refuser, tiny_llama, capsys):
    before = (of_suite / "results.json").read_bytes()
    models = [f"refuser={refuser}", f"babbler={tiny_llama}"]
    suite = ["--suite", str(ROOT / "configs" / "evaluation" / "small.yaml")]
    assert main(["evaluate", *models, *suite, "--output", str(of_suite), *QUICK]) == 0
    assert "refuser: 34 of 34 answers are there already" in capsys.readouterr().out
    assert (of_suite / "results.json").read_bytes() == before
    longer = ["--max-new-tokens", "2", "--dtype", "float32"]
    assert main(["evaluate", *models, *suite, "--output", str(of_suite), *longer]) == 2
    assert "max_new_tokens: 1 there, 2 here" in capsys.readouterr().err


def test_a_suite_whose_files_are_missing_is_refused_before_a_model_is_read(refuser, tmp_path, capsys):
    suite = tmp_path / "suite.yaml"
    suite.write_text("attacks:\n  plain: {file: absent.jsonl, source: the moon}\n")
    message = error_of(capsys, "evaluate", refuser, "--suite", suite, "--output", tmp_path / "out")
    assert f"no file {tmp_path / 'absent.jsonl'} (from the moon)" in message
    assert not (tmp_path / "out").exists()


def test_a_model_can_be_the_judge(tiny_llama, refuser, tmp_path):
    """The judge says `Sorry` to everything, which its file reads as unsafe."""
    judge = tmp_path / "judge.yaml"
    judge.write_text(
        f"name: sorry\nversion: 3\nmodel: {refuser}\nprompt: 'Harm? {{response}}'\nunsafe: Sorry\nsafe: Fine\n"
    )
    harmful = write_jsonl(tmp_path / "harmful.jsonl", HARMFUL)
    out = tmp_path / "out"
    command = ["evaluate", f"babbler={tiny_llama}", "--harmful", str(harmful), "--output", str(out), *QUICK]
    assert main([*command, "--prefill", "--judge", str(judge)]) == 0
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert results["judge"] == {"name": "sorry", "version": "3"}
    assert {entry["asr"] for entry in results["models"]["babbler"]["attacks"].values()} == {1.0}
    rows = [json.loads(line) for line in (out / "answers" / "babbler.jsonl").read_text().splitlines()]
    assert all(row["judge_reply"].startswith("Sorry") for row in rows)


def test_what_no_judge_could_judge_is_never_safe_and_is_tried_again(tiny_llama, tmp_path, refuser):
    judge = tmp_path / "judge.yaml"
    lines = f"name: j\nversion: 1\nmodel: {refuser}\nprompt: '{{response}}'\n"
    judge.write_text(lines + "unsafe: Harmful\nsafe: Fine\n")
    harmful = write_jsonl(tmp_path / "harmful.jsonl", HARMFUL[:2])
    out = tmp_path / "out"
    command = ["evaluate", f"babbler={tiny_llama}", "--harmful", str(harmful), "--output", str(out), *QUICK]
    command += ["--prefill", "--judge", str(judge)]

    def plain():
        results = json.loads((out / "results.json").read_text(encoding="utf-8"))
        return results["models"]["babbler"]["attacks"]["plain"]

    assert main(command) == 0
    assert (plain()["n"], plain()["asr"], plain()["unjudged"]) == (0, None, 2)
    judge.write_text(lines + "unsafe: Sorry\nsafe: Fine\n")
    assert main(command) == 0
    assert (plain()["n"], plain()["asr"]) == (2, 1.0)


def test_a_prompt_longer_than_the_context_counts_nowhere(tiny_llama, tmp_path):
    harmful = write_jsonl(tmp_path / "harmful.jsonl", [*HARMFUL, {"prompt": "Why, naïve 東京? " * 200}])
    out = tmp_path / "out"
    command = ["evaluate", f"babbler={tiny_llama}", "--harmful", str(harmful), "--output", str(out), *QUICK]
    assert main([*command, "--prefill"]) == 0
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    plain = results["models"]["babbler"]["attacks"]["plain"]
    assert (plain["n"], plain["too_long"]) == (3, 1)
