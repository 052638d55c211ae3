"""docs/serving.md says what is so: its examples run, and its tables are complete."""

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from derta_jax.cli import main
from derta_jax.evaluation.serving.guard import LONGEST_BODY
from derta_jax.evaluation.serving.protocol import ChatAsked, CompletionAsked
from derta_jax.planning.published import LLAMA_3_8B
from tests.evaluation.serving.conftest import running

DOCS = (Path(__file__).parents[3] / "docs" / "serving.md").read_text(encoding="utf-8")
ADDRESS = "http://127.0.0.1:8000"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", DOCS, flags=re.DOTALL)


@pytest.fixture(scope="module")
def first(subject):
    with running(subject, name="first") as server:
        yield server


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
def test_the_curl_examples_are_answered(first):
    block = next(block for block in blocks("sh") if block.startswith("curl"))
    commands = [shlex.split(f"curl{command}") for command in re.split(r"^curl", block, flags=re.MULTILINE)[1:]]
    assert len(commands) == 5
    replies = [
        subprocess.run(
            [*(word.replace(ADDRESS, first.url) for word in command), "--fail-with-body", "--silent"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for command in commands
    ]
    chat, completion, stream, models, health = replies
    assert json.loads(chat)["choices"][0]["message"]["role"] == "assistant"
    assert json.loads(completion)["usage"]["completion_tokens"] <= 64
    assert stream.endswith("data: [DONE]\n\n")
    assert json.loads(models)["data"][0]["id"] == "first"
    assert json.loads(health)["status"] == "ok"


def test_the_example_of_openais_client_runs(first, capsys):
    example = blocks("python")[0].replace(ADDRESS, first.url)
    names: dict = {}
    exec(example, names)
    names["client"].close()
    assert names["answer"].usage.completion_tokens
    assert capsys.readouterr().out.startswith(names["answer"].choices[0].message.content)


def test_every_parameter_has_its_row():
    table = DOCS.partition("| parameter | |")[2].partition("\n\n")[0]
    explained = set(re.findall(r"`(\w+)(?:\.\w+)?`", "\n".join(re.findall(r"^\| (.*?) \|", table, flags=re.MULTILINE))))
    known = (ChatAsked.model_fields | CompletionAsked.model_fields).keys() - {"add_generation_prompt"}
    assert explained - {"include_usage"} == known


def test_every_option_of_the_command_exists(capsys):
    with pytest.raises(SystemExit):
        main(["serve", "--help"])
    known = set(re.findall(r"--[a-z][a-z-]*", capsys.readouterr().out))
    prose = re.sub(r"```.*?```", "", DOCS, flags=re.DOTALL)
    ours = [line for block in blocks("sh") for line in block.splitlines() if line.startswith("derta serve")]
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", prose + "\n".join(ours))) <= known
    assert {"--batch-size", "--context", "--grace", "--host", "--mesh", "--name", "--queue"} <= known


def test_the_numbers_are_right():
    assert f"more than {LONGEST_BODY // 2**20} MiB" in DOCS
    head_size = LLAMA_3_8B["hidden_size"] // LLAMA_3_8B["num_attention_heads"]
    cached = 2 * LLAMA_3_8B["num_hidden_layers"] * LLAMA_3_8B["num_key_value_heads"] * head_size * 2
    assert cached * 32 * 4096 == 16 * 2**30
