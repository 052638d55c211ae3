"""`derta protect`: a fine-tune beneath security vectors, one config and three phases."""

import json
from pathlib import Path

import pytest
import yaml

from derta_jax.cli import main
from derta_jax.errors import StoppedEarly, UserError
from derta_jax.interop.hf_load import read_model_config
from derta_jax.interop.peft import load_adapter
from derta_jax.training.loop import train
from derta_jax.training.protect.config import load_protection
from derta_jax.training.protect.phases import protect
from tests.conftest import helpful
from tests.training.conftest import stop_after

ROOT = Path(__file__).parents[2]
TRAIN = {"batch_size": 8, "sequence_length": 96, "dtype": "float32", "remat": "none"}


def write_config(directory: Path, model: Path, known: Path, users: Path, **changes) -> Path:
    raw = {
        "model": {"path": str(model)},
        "output": str(directory / "out"),
        "vectors": {
            "data": {"path": str(known)},
            "lora": {"rank": 4, "alpha": 8, "dropout": 0.0},
            "train": TRAIN | {"steps": 30, "learning_rate": 3e-2},
        },
        "fine_tune": {
            "data": {"path": str(users), "recipe": "vanilla"},
            "train": TRAIN | {"steps": 6, "learning_rate": 1e-3},
        },
    }
    file = directory / "protect.yaml"
    file.write_text(yaml.safe_dump(raw | changes))
    return file


@pytest.fixture(scope="module")
def users(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("users") / "users.jsonl"
    file.write_text("".join(json.dumps(helpful(index)) + "\n" for index in range(20, 28)))
    return file


@pytest.fixture(scope="module")
def whole(tiny_llama, example_rows, users, tmp_path_factory, console):
    config = load_protection(write_config(tmp_path_factory.mktemp("whole"), tiny_llama, example_rows, users))
    return config, protect(config, console)


def test_the_report_says_what_was_absorbed(whole):
    config, report = whole
    losses = report["losses"]
    assert report["gradient_ratio"] < 1
    assert losses["before"]["on"]["harmful"] < 0.6 * losses["before"]["off"]["harmful"]
    assert losses["after"]["off"]["benign"] < losses["before"]["off"]["benign"]
    assert report["vectors_identical"]
    assert report["off_equals_base"]
    assert json.loads((config.directory / "report.json").read_text()) == report
    assert f"{losses['after']['off']['harmful']:.3f}" in (config.directory / "report.md").read_text()


def test_vectors_are_a_peft_adapter_and_the_release_a_model_without_them(whole, tiny_llama):
    config, _ = whole
    adapter = load_adapter(config.adapter, read_model_config(tiny_llama))
    assert adapter.scales["query"] == 2.0
    released = config.directory / "model"
    assert (released / "model.safetensors").is_file()
    assert not (released / "adapter_config.json").exists()


@pytest.mark.parametrize(("phase", "step"), [(1, 20), (2, 3)])
def test_a_run_that_is_stopped_in_either_phase_goes_on_to_the_same_model(
    phase, step, whole, tiny_llama, example_rows, users, tmp_path, console, monkeypatch
):
    config = load_protection(write_config(tmp_path, tiny_llama, example_rows, users))
    if phase == 2:
        train(config.vectors, console)
    with monkeypatch.context() as patch:
        stop_after(step, patch)
        with pytest.raises(StoppedEarly):
            protect(config, console)
    assert not (config.directory / "model").exists()
    assert protect(config, console) == whole[1]
    file = "model/model.safetensors"
    assert (config.directory / file).read_bytes() == (whole[0].directory / file).read_bytes()


def test_what_is_done_is_not_done_again(whole, console):
    config, report = whole
    files = ["vectors/metrics.jsonl", "fine_tune/metrics.jsonl", "model/model.safetensors", "report.json"]
    before = [(config.directory / file).stat().st_mtime_ns for file in files]
    assert protect(config, console) == report
    assert [(config.directory / file).stat().st_mtime_ns for file in files] == before


def test_bad_data_of_the_second_run_is_said_before_the_first(tiny_llama, example_rows, tmp_path, console):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"id": "h1", "prompt": "p", "respons": "r"}\n')
    config = load_protection(write_config(tmp_path, tiny_llama, example_rows, bad))
    with pytest.raises(UserError, match=r"bad\.jsonl:1"):
        protect(config, console)
    assert not (config.directory / "vectors" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("fine_tune.train.step=3", "did you mean 'fine_tune.train.steps'"),
        ("vectors.objective.name=dpo", "vectors.objective.name must be security_vectors"),
        ("fine_tune.train.output=elsewhere", "unknown key 'fine_tune.train.output'"),
        ("fine_tune={model: {path: x}}", "fine_tune: 'model' stands at the top of the file"),
        ("vectors.lora=null", "set lora.rank"),
    ],
)
def test_a_mistake_is_named(override, message, tiny_llama, example_rows, users, tmp_path):
    file = write_config(tmp_path, tiny_llama, example_rows, users)
    with pytest.raises(UserError) as raised:
        load_protection(file, [override])
    assert message in str(raised.value)


@pytest.mark.parametrize("file", sorted((ROOT / "configs" / "protect").glob("*.yaml")), ids=lambda file: file.stem)
def test_the_shipped_configs_are_valid(file):
    config = load_protection(file)
    assert config.fine_tune.frozen_adapters == {"vectors": "runs/protected/adapter"}
    assert config.vectors.objective.name == "security_vectors"


def test_the_command_checks_without_training(tiny_llama, example_rows, users, tmp_path, capsys):
    file = write_config(tmp_path, tiny_llama, example_rows, users)
    assert main(["protect", str(file), "--dry-run"]) == 0
    assert "lora      rank 4" in capsys.readouterr().out
    assert not (tmp_path / "out" / "vectors" / "metrics.jsonl").exists()
