"""The command as its users meet it: every mistake is one message and exit code 2, a stop is 75 with all saved."""

import contextlib
import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from safetensors.numpy import load_file, save_file

from derta_jax.cli import main
from derta_jax.data.loader import Batches
from derta_jax.training.program import Program
from tests.conftest import helpful, triple, write_jsonl, write_tiny_model

TINY = str(Path(__file__).parents[1] / "configs" / "tiny.yaml")
LENGTH = "train.sequence_length=64"
COMMANDS = [
    "demo", "prepare", "inspect", "train", "generate", "serve", "evaluate", "judge", "answers", "export", "convert",
]  # fmt: skip


@pytest.fixture
def refused(capsys) -> Callable[..., str]:
    """What a command that exits with 2 says on stderr."""

    def run(*words: object) -> str:
        capsys.readouterr()
        assert main([str(word) for word in words]) == 2
        _, message = capsys.readouterr()
        assert message.startswith(f"derta {words[0]}: ")
        assert "Traceback" not in message
        return message

    return run


def train_command(model: Path, data: Path, output: Path) -> list[str]:
    """Three small steps."""
    keys = {"model.path": model, "data.path": data, "train.output": output}
    return ["train", TINY, *(f"{key}={path}" for key, path in keys.items()), "train.steps=3", LENGTH]


@pytest.fixture
def train_words(tiny_llama, rows_file, tmp_path) -> list[str]:
    return train_command(tiny_llama, rows_file, tmp_path / "run")


@pytest.fixture
def model(tiny_llama, tmp_path) -> Path:
    """A copy of the model, to be damaged."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


@pytest.fixture(scope="module")
def compile_once(tmp_path_factory) -> Iterator[None]:
    """Runs of the same shapes share what was compiled."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    for name, value in zip(names, (str(tmp_path_factory.mktemp("compiled")), 0.0), strict=True):
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@contextlib.contextmanager
def signal_at_step_two(number: signal.Signals) -> Iterator[None]:
    """Raise a signal in this process while a run is at its second step."""
    iterate = Batches.iterate

    def interrupted(self, start: int):
        for step, batch in enumerate(iterate(self, start), start=start + 1):
            if step == 2:
                signal.raise_signal(number)
            yield batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Batches, "iterate", interrupted)
        yield


@pytest.fixture(scope="module")
def terminated(tiny_llama, tmp_path_factory, compile_once) -> tuple[list[str], int]:
    """The command and the exit code of a run that got SIGTERM at its second step of three."""
    directory = tmp_path_factory.mktemp("terminated")
    data = write_jsonl(directory / "rows.jsonl", [triple(i) for i in range(6)] + [helpful(i) for i in range(10)])
    words = train_command(tiny_llama, data, directory / "run")
    with signal_at_step_two(signal.SIGTERM):
        return words, main(words)


@pytest.fixture
def stopped_run(terminated, tmp_path) -> Path:
    """A copy of the stopped run's directory, to go on in."""
    output = next(word for word in terminated[0] if word.startswith("train.output="))
    return Path(shutil.copytree(output.partition("=")[2], tmp_path / "run"))


def steps_in(run: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: derta {command}")


def test_the_help_lists_every_command_and_the_exit_codes(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    out = capsys.readouterr().out
    assert all(command in out for command in COMMANDS)
    assert "75 stopped early" in out


def test_the_version_and_what_a_bug_report_needs_besides(capsys):
    assert main(["--version"]) == 0
    assert re.fullmatch(r"derta_jax \d+\.\d+\.\d+\n", capsys.readouterr().out)
    assert main(["--version", "--verbose"]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert {"python", "derta_jax", "jax", "flax", "orbax-checkpoint", "platform", "devices"} <= lines.keys()
    assert lines["devices"] == "8 × cpu (cpu)"


@pytest.mark.parametrize("words", [[], ["trian"], ["train"], ["train", TINY, "--stpes=3"], ["prepare", "a", "b=c"]])
def test_a_command_line_that_makes_no_sense_gets_the_usage(words, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith("usage: derta")


def test_a_mistake_is_exit_code_2_and_one_line_for_the_shell_too():
    command = [sys.executable, "-m", "derta_jax.cli", "train", TINY, "train.stpes=3"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == (
        "derta train: unknown key 'train.stpes' in override 'train.stpes=3'; did you mean 'train.steps'?\n"
    )


@pytest.mark.parametrize("command", ["train", "inspect"])
def test_a_misspelt_key_is_told_its_nearest_spelling(refused, command):
    assert "did you mean 'objective.rto_weight'?" in refused(command, TINY, "objective.rto_wieght=2")


@pytest.mark.parametrize("command", ["train", "inspect"])
def test_a_config_that_is_not_there_is_told_a_near_one(refused, command):
    missing = TINY.replace("tiny", "tyni")
    assert f"no config file {missing}; did you mean '{TINY}'?" in refused(command, missing)


BAD_LINES = {
    "broken JSON": (b'{"id": "a", ', "not valid JSON at column 13"),
    "a missing field": (b'{"id": "a", "prompt": "b", "safe": "c"}', "harmful: missing"),
    "an empty answer": (b'{"id": "a", "prompt": "b", "response": ""}', "response: is empty"),
    "a wrong type": (b'{"id": "a", "prompt": 7, "response": "c"}', "prompt: must be a string, not a number"),
    "not UTF-8": (b'{"id": "a", "prompt": "\xe9"}', "byte 24 of the line is not UTF-8"),
}


@pytest.mark.parametrize(("line", "problem"), BAD_LINES.values(), ids=BAD_LINES)
def test_a_bad_line_is_named_by_prepare_and_nothing_is_written(refused, rows_file, tmp_path, line, problem):
    rows_file.write_bytes(rows_file.read_bytes() + line)
    message = refused("prepare", rows_file, "--output", tmp_path / "dataset")
    assert f"{rows_file}:17: {problem}" in message
    assert not (tmp_path / "dataset").exists()


@pytest.mark.parametrize(("line", "problem"), BAD_LINES.values(), ids=BAD_LINES)
def test_a_bad_line_is_named_by_train_and_nothing_is_written(refused, train_words, rows_file, tmp_path, line, problem):
    rows_file.write_bytes(rows_file.read_bytes() + line)
    assert f"{rows_file}:17: {problem}" in refused(*train_words)
    assert not (tmp_path / "run").exists()


def test_a_step_that_the_devices_cannot_hold_is_told_what_takes_less(refused, train_words, monkeypatch):
    def lower(program):
        raise jax.errors.JaxRuntimeError(
            "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 31.2G of 15.7G"
        )

    monkeypatch.setattr(Program, "lower", lower)
    message = refused(*train_words)
    assert (
        "a step does not fit the devices' memory: RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm" in message
    )
    assert "train.remat=full or offload, more train.accumulation" in message


def test_data_that_is_not_there_is_told_how_to_make_it(refused, train_words, tmp_path):
    message = refused(*train_words, f"data.path={tmp_path / 'nothing'}")
    assert f"no dataset in {tmp_path}/nothing: run `derta prepare FILE.jsonl --output" in message


def test_a_model_that_is_not_there_is_named(refused, train_words, tmp_path):
    message = refused(*train_words, f"model.path={tmp_path / 'nothing'}")
    assert f"{tmp_path}/nothing is no model: neither a Hugging Face directory (config.json) nor" in message


def test_a_tokenizer_without_eos_is_refused(refused, train_words, model):
    file = model / "tokenizer_config.json"
    raw = json.loads(file.read_text())
    del raw["eos_token"]
    file.write_text(json.dumps(raw))
    message = refused(*train_words, f"model.path={model}")
    assert f"the tokenizer in {model} has no eos token" in message


@pytest.mark.parametrize("command", ["train", "inspect"])
def test_a_refusal_word_of_several_tokens_is_refused_with_its_pieces(refused, train_words, command):
    message = refused(command, *train_words[1:], "objective.refusal_token=Apologies")
    assert "the refusal word 'Apologies' is not a single token" in message
    assert "(it becomes ['A', 'p', 'o'" in message
    assert "set objective.refusal_token" in message


def test_weights_that_do_not_fit_are_all_listed(refused, train_words, model):
    weights = load_file(model / "model.safetensors")
    del weights["model.layers.0.mlp.up_proj.weight"]
    weights["model.layers.0.mlp.upp_proj.weight"] = np.zeros((64, 32), np.float32)
    weights["model.norm.weight"] = np.zeros(31, np.float32)
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    message = refused(*train_words, f"model.path={model}")
    assert "missing model.layers.0.mlp.up_proj.weight [64, 32]" in message
    assert "unknown model.layers.0.mlp.upp_proj.weight; did you mean 'model.layers.0.mlp.up_proj.weight'?" in message
    assert "model.norm.weight has shape [31], config.json asks for [32]" in message


@pytest.mark.parametrize("command", ["train", "inspect"])
def test_rows_cut_before_their_first_label_leave_nothing_to_train_on(refused, train_words, command):
    message = refused(command, *train_words[1:], "train.sequence_length=4")
    assert "no row has a labelled token left: raise train.sequence_length" in message


def test_a_mesh_that_does_not_fit_the_devices_is_refused(refused, train_words):
    assert "but there are 8 devices" in refused(*train_words, "mesh.fsdp=3")


def test_prepare_says_what_it_wrote(rows_file, tmp_path, capsys):
    assert main(["prepare", str(rows_file), "--output", str(tmp_path / "dataset")]) == 0
    assert capsys.readouterr().out.startswith("16 examples (6 triple, 10 helpful), hash ")
    assert (tmp_path / "dataset" / "dataset.json").is_file()


def test_a_dry_preparation_writes_nothing(rows_file, tmp_path, capsys):
    assert main(["prepare", str(rows_file), "--output", str(tmp_path / "dataset"), "--dry-run"]) == 0
    assert "16 examples (6 triple, 10 helpful)" in capsys.readouterr().out
    assert not (tmp_path / "dataset").exists()


def test_a_dry_preparation_finds_the_same_mistakes(refused, rows_file, tmp_path):
    write_jsonl(rows_file, [triple(0, safe="")])
    assert f"{rows_file}:1: safe: is empty" in refused("prepare", rows_file, "--output", tmp_path / "d", "--dry-run")


def test_a_dry_run_shows_the_plan_and_writes_nothing(train_words, tmp_path, capsys):
    before = set(tmp_path.rglob("*"))
    assert main([*train_words, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "22 rows by derta" in out
    assert "3 in all" in out
    assert "data 1 × fsdp 8 × expert 1 × tensor 1" in out
    assert set(tmp_path.rglob("*")) == before


def test_the_plan_names_rows_that_lost_their_labels(train_words, rows_file, capsys):
    write_jsonl(rows_file, [helpful(0), helpful(1, id="too-long", prompt="How? " * 40)])
    assert main([*train_words, "--dry-run"]) == 0
    assert "1 rows that have no label left after cutting: too-long" in capsys.readouterr().out


def test_a_terminated_run_is_exit_code_75_with_everything_saved(terminated, stopped_run):
    assert terminated[1] == 75
    assert steps_in(stopped_run) == [1, 2]
    assert [step.name for step in (stopped_run / "checkpoints").iterdir()] == ["2"]
    assert not (stopped_run / "summary.json").exists()


def test_the_same_command_goes_on_where_a_stopped_run_was(terminated, stopped_run, capsys):
    assert main([*terminated[0], f"train.output={stopped_run}"]) == 0
    assert "resumed   at step 2 of 3" in capsys.readouterr().out
    assert steps_in(stopped_run) == [1, 2, 3]
    assert json.loads((stopped_run / "summary.json").read_text())["resumed_from"] == 2


def test_ctrl_c_says_that_all_is_saved_and_how_to_go_on(train_words, tmp_path, compile_once, capsys):
    with signal_at_step_two(signal.SIGINT):
        assert main(train_words) == 75
    message = "derta train: stopped after step 2 of 3, saved; the same command resumes there\n"
    assert capsys.readouterr().err == message
    assert steps_in(tmp_path / "run") == [1, 2]


def test_a_checkpoint_of_another_model_is_refused_with_the_differences(refused, terminated, stopped_run, tmp_path):
    other = write_tiny_model(tmp_path / "other", hidden_size=16)
    message = refused(*terminated[0], f"train.output={stopped_run}", f"model.path={other}")
    assert f"{stopped_run}/checkpoints holds checkpoints of another run" in message
    assert "32 in the checkpoint, 16 now" in message
    assert "choose another train.output, or set these back to resume" in message


def test_a_checkpoint_of_other_data_is_refused_with_the_differences(refused, terminated, stopped_run, tmp_path):
    other = write_jsonl(tmp_path / "other.jsonl", [triple(i) for i in range(9)])
    message = refused(*terminated[0], f"train.output={stopped_run}", f"data.path={other}", "train.seed=1")
    assert "data.content_hash: " in message
    assert "train.seed: 0 in the checkpoint, 1 now" in message
