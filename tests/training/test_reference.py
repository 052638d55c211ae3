"""Objectives that look back at the model that training began with: beneath an adapter, or in a file."""

import json

import numpy as np
import pytest

from derta_jax.errors import StoppedEarly
from derta_jax.training import reference
from derta_jax.training.loop import train
from tests.conftest import triple, write_jsonl
from tests.training.conftest import losses_of, make_run_config, metrics_of, stop_after

LORA = {"rank": 4, "dropout": 0.0}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return write_jsonl(tmp_path_factory.mktemp("rows") / "pairs.jsonl", [triple(i) for i in range(8)])


@pytest.fixture
def dpo_config(tiny_llama, pairs, tmp_path):
    def make(name="run", train=None, **sections):
        train = {"sequence_length": 160, "steps": 6} | (train or {})
        objective = {"name": "dpo", "beta": 0.5}
        return make_run_config(tiny_llama, pairs, tmp_path / name, objective=objective, train=train, **sections)

    return make


@pytest.fixture
def computed(monkeypatch):
    """How often the reference is computed."""
    times: list[str] = []
    original = reference._compute

    def counted(run, looked_at, console):
        times.append("again")
        return original(run, looked_at, console)

    monkeypatch.setattr(reference, "_compute", counted)
    return times


@pytest.mark.parametrize(
    ("lora", "learning_rate"), [({}, 3e-3), ({"lora": LORA}, 1e-2)], ids=["in a file", "beneath an adapter"]
)
def test_training_prefers_the_chosen_answers(dpo_config, console, lora, learning_rate):
    config = dpo_config(train={"learning_rate": learning_rate, "steps": 12}, **lora)
    train(config, console)
    records = metrics_of(config)
    assert records[0]["loss_dpo"] == pytest.approx(np.log(2), rel=1e-5)
    assert records[-1]["accuracy"] == 1
    assert records[-1]["margin"] > 0.5


def test_a_resumed_run_reads_what_it_has_computed(dpo_config, console, computed, monkeypatch):
    whole = dpo_config("whole")
    train(whole, console)
    stopped = dpo_config("stopped")
    with monkeypatch.context() as patched:
        stop_after(3, patched)
        with pytest.raises(StoppedEarly):
            train(stopped, console)
    assert len(computed) == 2
    train(stopped, console)
    assert len(computed) == 2
    np.testing.assert_array_equal(losses_of(stopped), losses_of(whole))


@pytest.mark.parametrize("damage", ["cut", "gone", "changed"])
def test_a_damaged_file_is_made_again(dpo_config, console, computed, monkeypatch, damage, tmp_path):
    config = dpo_config()
    with monkeypatch.context() as patched:
        stop_after(3, patched)
        with pytest.raises(StoppedEarly):
            train(config, console)
    file = tmp_path / "run" / "rows" / "reference-train.nll"
    content = file.read_bytes()
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(content[:-4] if damage == "cut" else content[:-1] + bytes([content[-1] ^ 1]))
    train(config, console)
    assert len(computed) == 2
    assert file.read_bytes() == content


def test_held_out_pairs_are_measured_against_the_same_model(dpo_config, console, tmp_path, pairs):
    config = dpo_config(held_out={"path": str(pairs), "every_steps": 3})
    train(config, console)
    first, _, last = map(json.loads, (tmp_path / "run" / "held_out.jsonl").read_text().splitlines())
    assert first["held_out_loss"] == pytest.approx(np.log(2), rel=1e-6)
    assert last["held_out_margin"] > first["held_out_margin"] == 0
