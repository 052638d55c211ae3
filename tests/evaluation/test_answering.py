"""Prompts to answers: gone on with after any stop, too long ones reported, progress told."""

import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
import time

import jax
import pytest
from rich.console import Console

from derta_jax.cli import main
from derta_jax.config import MeshShape
from derta_jax.errors import StoppedEarly, UserError
from derta_jax.evaluation import answering
from derta_jax.evaluation.answering import TOO_LONG, answer_all, fingerprint, settings_of
from derta_jax.evaluation.generate import generate
from derta_jax.evaluation.row_log import RowLog
from derta_jax.evaluation.subject import Generation, open_subject, parse_mesh
from tests.conftest import write_jsonl, write_tiny_model

HOW = Generation(8, 4, None, "float32")
PROMPTS = [[5 + number, 6, 7 + number % 3] for number in range(12)]


@pytest.fixture
def console():
    return Console(file=io.StringIO(), width=200)


@pytest.fixture(scope="module")
def subject(tiny_llama):
    return open_subject(tiny_llama, HOW, Console(quiet=True))


@pytest.fixture(scope="module")
def expected(subject):
    with jax.set_mesh(subject.mesh):
        return generate(subject.model, subject.params, PROMPTS, 8, subject.stop_ids, 4)


def answers_to(subject, log, console, prompts=PROMPTS, how=HOW):
    return answer_all(subject, prompts, how, log, console, "kites")


def test_an_answer_that_is_there_is_not_made_again(subject, expected, tmp_path, console):
    settings = settings_of(subject, HOW, PROMPTS)
    with RowLog(tmp_path / "log", settings) as log:
        log.add(3, {"response": "given", "response_token_ids": [9, 9], "finish_reason": "stop"})
        answers = answers_to(subject, log, console)
    assert answers[3].token_ids == [9, 9]
    assert answers[:3] + answers[4:] == expected[:3] + expected[4:]
    assert "1 of 12 answers are there already" in console.file.getvalue()


def test_ctrl_c_keeps_what_is_finished_and_says_where(subject, expected, tmp_path, console, monkeypatch):
    settings = settings_of(subject, HOW, PROMPTS)

    finished = []

    def interrupted(progress, tokens):
        finished.append(tokens)
        if len(finished) == 5:
            raise KeyboardInterrupt

    with RowLog(tmp_path / "log", settings) as log, monkeypatch.context() as patch:
        patch.setattr(answering.AnswerProgress, "answered", interrupted)
        with pytest.raises(StoppedEarly, match=r"5 of 12 answers are in .*log, the same command goes on"):
            answers_to(subject, log, console)
    with RowLog(tmp_path / "log", settings) as log:
        assert len(log.rows) == 5
        assert answers_to(subject, log, console) == expected
        assert sorted(log.rows) == list(range(12))


def test_a_prompt_that_fills_the_context_is_reported_and_has_no_answer(subject, expected, tmp_path, console):
    context = subject.model.config.max_positions
    prompts = [PROMPTS[0], [5] * context, [5] * (context - 2), PROMPTS[1]]
    with RowLog(tmp_path / "log", {}) as log:
        answers = answers_to(subject, log, console, prompts)
    assert (answers[1].token_ids, answers[1].finish_reason) == ([], TOO_LONG)
    assert len(answers[2].token_ids) <= 2
    assert [answers[0], answers[3]] == expected[:2]
    assert f"1 of 4 prompts do not fit the context of {context} tokens" in console.file.getvalue()


def test_a_log_without_a_terminal_gets_lines_with_a_rate_and_what_is_left(subject, console, monkeypatch):
    monkeypatch.setattr(answering, "SECONDS_BETWEEN_LINES", 0.0)
    answers_to(subject, None, console)
    lines = console.file.getvalue().splitlines()
    assert "kites: 1 of 12 answers" in lines[0]
    assert "tokens/s" in lines[0]
    assert "s left" in lines[0]
    assert lines[-1].startswith("kites: 12 answers, ")


def test_the_fingerprint_is_that_of_the_weights_wherever_they_lie(subject, tiny_llama, tmp_path):
    copied = tmp_path / "copy"
    subprocess.run(["cp", "-r", str(tiny_llama), str(copied)], check=True)
    sharded = dataclasses.replace(HOW, mesh=MeshShape(fsdp=4, tensor=2))
    assert fingerprint(open_subject(copied, sharded, Console(quiet=True))) == fingerprint(subject)
    other = write_tiny_model(tmp_path / "other", rms_norm_eps=1e-4)
    assert fingerprint(open_subject(other, HOW, Console(quiet=True))) != fingerprint(subject)


def test_one_bit_of_one_weight_changes_the_fingerprint(subject):
    layer = subject.params["layers_1"]
    nudged = layer["gate"].at[2, 3].set(jax.numpy.nextafter(layer["gate"][2, 3], 1.0))
    params = {**subject.params, "layers_1": {**layer, "gate": nudged}}
    assert fingerprint(dataclasses.replace(subject, params=params)) != fingerprint(subject)


@pytest.mark.parametrize(
    ("text", "message"),
    [("tenser=2", "did you mean 'tensor'"), ("tensor=two", "valid integer"), ("data=0", "greater than or equal to 1")],
)
def test_a_mesh_that_cannot_be_is_refused(text, message):
    with pytest.raises(UserError, match=message):
        parse_mesh(text)


# The command


def rows_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.slow
def test_a_killed_command_goes_on_without_losing_or_repeating_a_row(tiny_mixtral, tmp_path):
    prompts = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "How " * (1 + n % 9) + f"{n}?"} for n in range(64)])
    options = ["--prompts", str(prompts), "--max-new-tokens", "24", "--batch-size", "8", "--dtype", "float32"]
    assert main(["generate", str(tiny_mixtral), *options, "--output", str(tmp_path / "whole.jsonl")]) == 0
    output = tmp_path / "killed.jsonl"
    command = [sys.executable, "-m", "derta_jax.cli", "generate", str(tiny_mixtral), *options, "--output", str(output)]
    partial = tmp_path / "killed.jsonl.partial"
    process = subprocess.Popen(command, env=os.environ | {"XLA_FLAGS": ""}, stdout=subprocess.DEVNULL)
    while process.poll() is None and (not partial.exists() or partial.read_bytes().count(b"\n") < 10):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    kept = partial.read_bytes().count(b"\n") - 1
    assert 9 <= kept < 64
    again = subprocess.run(command, env=os.environ | {"XLA_FLAGS": ""}, capture_output=True, text=True, check=True)
    assert f"{kept} of 64 answers are there already" in again.stdout
    assert rows_of(output) == rows_of(tmp_path / "whole.jsonl")
    assert not partial.exists()


def test_a_run_with_another_seed_does_not_go_on(tiny_llama, tmp_path, capsys):
    prompts = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "How?"}])
    output = tmp_path / "a.jsonl"
    options = ["--prompts", str(prompts), "--output", str(output), "--max-new-tokens", "2", "--dtype", "float32"]
    subject = open_subject(tiny_llama, dataclasses.replace(HOW, max_new_tokens=2), Console(quiet=True))
    ids = [subject.tokenizer.prompt_ids(subject.template.render("How?"))]
    how = Generation(2, 32, None, "float32", temperature=1.0, seed=1)
    RowLog(tmp_path / "a.jsonl.partial", settings_of(subject, how, ids)).__exit__()
    assert main(["generate", str(tiny_llama), *options, "--temperature", "1", "--seed", "2"]) == 2
    assert "seed: 1 there, 2 here" in capsys.readouterr().err
    assert main(["generate", str(tiny_llama), *options, "--temperature", "1", "--seed", "1"]) == 0
