"""docs/reproduce.md and docs/pods.md: every command, on a model of two layers and a bucket in a directory."""

import importlib.util
import re
import shlex
import shutil
from pathlib import Path

import pytest

from derta_jax.cli import main
from tests.conftest import helpful, triple, write_jsonl
from tests.tpu.conftest import Cloud

ROOT = Path(__file__).parents[1]
PODS = (ROOT / "docs" / "pods.md").read_text(encoding="utf-8")
REPRODUCE = (ROOT / "docs" / "reproduce.md").read_text(encoding="utf-8")
COMMANDS = [
    line
    for block in re.findall(r"```sh\n(.*?)```", REPRODUCE, re.DOTALL)
    for line in block.splitlines()
    if line.strip()
]
SMALL = "train.steps=2 train.batch_size=8 checkpoint.every_steps=2 "


@pytest.fixture(scope="module")
def workplace(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipe in small under its own name, and small files under the names that the guide gives."""
    place = tmp_path_factory.mktemp("reproduce")
    shutil.copytree(ROOT / "configs", place / "configs")
    tiny = (place / "configs" / "tiny.yaml").read_text()
    recipe = tiny.replace("  path: model\n", "  path: MODEL\n").replace("  path: data\n", "  path: data/derta\n")
    (place / "configs" / "llama3_8b_full.yaml").write_text(recipe)
    shutil.copy(place / "configs" / "evaluation" / "small.yaml", place / "configs" / "evaluation" / "paper.yaml")
    (place / "data" / "evaluation").mkdir(parents=True)
    shutil.copytree(tiny_llama, place / "meta-llama" / "Meta-Llama-3-8B")
    write_jsonl(place / "triples.jsonl", [triple(i) for i in range(6)])
    write_jsonl(place / "helpful.jsonl", [helpful(i) for i in range(10)])
    (place / "evaluation.txt").write_text("What is it that you will be asked?\n")
    return place


def on_this_machine(command: str) -> str:
    """Without the pod, the bucket as a directory, and a few steps in place of 1,032."""
    if command.startswith("tpu/pod run"):
        words = shlex.split(command)
        command = words[-1].partition(" && ")[0] if "bash" in words else shlex.join(words[words.index("derta") :])
    command = command.replace("gs://my-bucket/", "bucket/").replace("train.steps=516 ", "")
    if command.startswith("derta train"):
        command = command.replace("llama3_8b_full.yaml ", f"llama3_8b_full.yaml {SMALL}")
    return command + (" --max-new-tokens 8" if command.startswith("derta evaluate") else "")


@pytest.mark.slow
def test_every_command_of_the_guide_runs(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)
    monkeypatch.setenv("XDG_CACHE_HOME", str(workplace / "cache"))
    ran = []
    for command in map(on_this_machine, COMMANDS):
        name = command.split()[1]
        if name == "plan" and importlib.util.find_spec("libtpu") is None:
            continue  # there is none for this machine
        if name == "plan":
            command += " model.path=meta-llama/Meta-Llama-3-8B train.sequence_length=64 train.batch_size=16"
        assert main(shlex.split(command)[1:]) == 0, command
        ran.append(name)
    assert [name for name in ran if name != "plan"] == [
        "prepare", "inspect", "convert", "train", "train", "train", "train", "train", "train", "evaluate", "export",
    ]  # fmt: skip
    assert (workplace / "eval" / "paper" / "report.html").is_file()
    assert (workplace / "exported" / "derta" / "model.safetensors").is_file()


def test_the_pods_commands_are_ones_and_take_the_files_that_they_need(tmp_path: Path, workplace: Path) -> None:
    (workplace / "data" / "mine").mkdir(exist_ok=True)
    (workplace / "data" / "derta").mkdir(exist_ok=True)
    cloud = Cloud(tmp_path)
    shutil.copytree(workplace, cloud.home, dirs_exist_ok=True)
    indented = [line.strip() for line in PODS.splitlines() if line.startswith("    tpu/pod ")]
    listed = re.findall(r"^\| `(tpu/pod [^`]*)`", PODS, re.MULTILINE)
    wanted = [line for line in COMMANDS if line.startswith("tpu/pod")]
    assert len(indented) + len(listed) + len(wanted) > 12
    for command in [*indented, *listed, *wanted]:
        words = shlex.split(command.replace("COMMAND …", "true"))[1:]
        shown = cloud.pod("--dry-run", *[word for word in words if word != "--dry-run"])
        assert shown.returncode == 0, f"{command}\n{shown.stderr}"
        if "derta train configs" in command:
            assert "configs/llama3_8b_full.yaml" in shown.stdout
            if "data.path" not in command:
                assert "data/derta" in shown.stdout.partition("taking along: ")[2].splitlines()[0]
    bash = shlex.split(next(line for line in wanted if " bash " in line))[-1].partition(" && ")[2]
    assert not cloud.refusals(bash)


def test_the_figures_are_those_of_the_recipe() -> None:
    recipe = (ROOT / "configs" / "llama3_8b_full.yaml").read_text(encoding="utf-8")
    (memory,) = re.findall(r"#   v5e-16\s+([\d.]+)/([\d.]+)", recipe)
    assert f"{memory[0]} of {memory[1]} GiB a chip" in REPRODUCE
    for name in ("vanilla", "DPO", "DeRTa"):
        (row,) = re.findall(rf"#   {name} +([\d. ]+)\n", recipe)
        assert f"| {name} | {' | '.join(row.split())} |" in REPRODUCE
