"""The README is a promise: its commands run as they stand, and its table is the one the demo printed."""

import importlib.util
import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest

from derta_jax.cli import main
from derta_jax.config import config_keys
from derta_jax.evaluation.report import results_markdown
from tests.conftest import helpful, triple, write_jsonl

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


@pytest.fixture(scope="module")
def workplace(tiny_llama, tmp_path_factory) -> Path:
    """A directory with everything that the README's commands name."""
    place = tmp_path_factory.mktemp("readme")
    shutil.copytree(ROOT / "configs", place / "configs")
    shutil.copytree(tiny_llama, place / "MODEL")
    write_jsonl(place / "triples.jsonl", [triple(i) for i in range(6)])
    write_jsonl(place / "helpful.jsonl", [helpful(i) for i in range(10)])
    write_jsonl(place / "harmful.jsonl", [triple(i) for i in range(6, 8)])
    write_jsonl(place / "benign.jsonl", [helpful(i) for i in range(10, 12)])
    write_jsonl(place / "questions.jsonl", [{"question": "How are you?"}])
    return place


@pytest.mark.slow
def test_the_road_from_data_to_exported_model_runs_as_written(workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    commands = [line for block in blocks("sh") for line in block.splitlines() if line.startswith("derta ")]
    assert [command.split()[1] for command in commands] == [
        "prepare", "inspect", "train", "train", "doctor", "plan", "generate", "evaluate", "judge", "export", "export",
        "export", "convert",
    ]  # fmt: skip
    monkeypatch.setenv("XDG_CACHE_HOME", str(workplace / "cache"))
    for command in commands:
        if command.split()[1] == "plan" and importlib.util.find_spec("libtpu") is None:
            continue  # there is none for this machine
        assert main(shlex.split(command, comments=True)[1:]) == 0, command

    (snippet,) = blocks("python")
    namespace = {"token_ids": np.array([[1, 2, 3]])}
    exec(snippet, namespace)
    assert namespace["logits"].dtype == np.float32
    assert (workplace / "elsewhere" / "model.safetensors").is_file()


def test_the_table_is_the_one_that_the_demo_printed():
    results = json.loads((ROOT / "docs" / "demo_results.json").read_text())
    assert results_markdown(results).strip() in README


def test_make_targets_exist():
    targets = re.findall(r"^(\w+):.*##", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert set(re.findall(r"make (\w+)", README)) <= set(targets)


def test_the_api_reference_has_every_room():
    (rooms,) = re.findall(r"^ROOMS := (.*)$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    found = (ROOT / "derta_jax").iterdir()
    paths = [path for path in found if path.suffix == ".py" or (path / "__init__.py").is_file()]
    commands = {"__init__", "cli", "arguments", "descriptions"}
    assert {*rooms.split()} == {path.stem for path in paths} - commands


def test_every_key_that_is_explained_exists():
    explained = re.findall(r"^\| (`.*?`(?:, `.*?`)*) \|", README, flags=re.MULTILINE)
    keys = {key for cell in explained for key in re.findall(r"`(.*?)`", cell)}
    assert "data.recipe" in keys
    assert keys <= set(config_keys())


def test_files_that_are_linked_exist():
    for target in re.findall(r"\]\(([^)]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target
