"""Runs of the tiny models."""

import json
import os
import signal
from pathlib import Path

import pytest
from rich.console import Console

from derta_jax.config import RunConfig
from derta_jax.training import loop
from tests.conftest import write_example_rows


def make_run_config(directory: Path, rows: Path, output: Path, **sections) -> RunConfig:
    """A config of a tiny model; sections given as keywords are merged in, an objective with a name as it is."""
    raw = {
        "model": {"path": str(directory)},
        "data": {"path": str(rows)},
        "train": {
            "output": str(output),
            "steps": 6,
            "batch_size": 8,
            "sequence_length": 96,
            "learning_rate": 1e-3,
            "dtype": "float32",
            "remat": "none",
        },
        "objective": {"sorry_keep_rate": 0.3},
        "checkpoint": {"every_steps": 2, "every_minutes": None},
    }
    for section, values in sections.items():
        raw[section] = values if "name" in values else raw.get(section, {}) | values
    return RunConfig.model_validate(raw)


@pytest.fixture(scope="session")
def example_rows(tmp_path_factory) -> Path:
    return write_example_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl")


@pytest.fixture
def run_config(tiny_llama, rows_file, tmp_path):
    """`make_run_config` of the tiny Llama, its output under the name given first."""

    def make(name: str = "run", **sections) -> RunConfig:
        return make_run_config(tiny_llama, rows_file, tmp_path / name, **sections)

    return make


@pytest.fixture(scope="session")
def console() -> Console:
    return Console(quiet=True)


def metrics_of(config: RunConfig) -> list[dict]:
    return [json.loads(line) for line in (Path(config.train.output) / "metrics.jsonl").read_text().splitlines()]


def losses_of(config: RunConfig) -> list[float]:
    return [record["loss"] for record in metrics_of(config)]


def stop_after(step: int, monkeypatch, signal_number: int = signal.SIGINT) -> None:
    """Send this process a signal when the metrics of `step` are made."""
    original = loop.step_record

    def record(number, *args):
        if number == step:
            os.kill(os.getpid(), signal_number)
        return original(number, *args)

    monkeypatch.setattr(loop, "step_record", record)
