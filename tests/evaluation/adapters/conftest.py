"""Models for other tools' benchmarks, and processes that have no torch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer, processors

from derta_jax.evaluation.adapters.opening import open_model
from tests.conftest import write_tiny_model, write_tokenizer

ROOT = Path(__file__).parents[3]

CHAT = (
    "{% for turn in messages %}<s>{{ turn['role'] }}: {{ turn['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)


def add_bos(directory: Path) -> None:
    """The tokenizer begins every text with <s>, as those of Llama and Mistral do."""
    file = str(directory / "tokenizer.json")
    tokenizer = Tokenizer.from_file(file)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(file)


@pytest.fixture(scope="session")
def with_bos(tmp_path_factory) -> Path:
    directory = write_tiny_model(tmp_path_factory.mktemp("adapters") / "with_bos")
    add_bos(directory)
    return directory


@pytest.fixture(scope="session")
def chatting(tmp_path_factory) -> Path:
    """A model whose tokenizer has a chat template."""
    directory = write_tiny_model(tmp_path_factory.mktemp("adapters") / "chatting")
    write_tokenizer(directory, CHAT)
    return directory


@pytest.fixture(scope="session")
def subject(chatting):
    return open_model(str(chatting), 4, "float32", None, {"fsdp": 4, "tensor": 2})


def run_without_torch(module: str, arguments: str, place: Path, ignored: str = "", **environment: str) -> str:
    """What `python -m module` prints in a directory, without importing torch.

    Warnings are errors, but for the one `ignored`.
    """
    code = f"""
import runpy, sys
from derta_jax.evaluation.adapters.without_torch import do_without_torch
do_without_torch()
sys.argv = ["program", *sys.argv[1:]]
try:
    runpy.run_module({module!r}, run_name="__main__", alter_sys=True)
except SystemExit as end:
    assert not end.code, end.code
assert "jax" in sys.modules
assert "torch" not in sys.modules
"""
    warnings = ["-W", "error", *(["-W", f"ignore:{ignored}"] if ignored else [])]
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(place)])
    command = [sys.executable, *warnings, "-c", code, *arguments.split()]
    done = subprocess.run(command, capture_output=True, text=True, cwd=place, env=os.environ | environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr
