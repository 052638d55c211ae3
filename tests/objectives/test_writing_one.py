"""The objective that docs/objectives.md writes from nothing, as a reader would run it."""

import re
from pathlib import Path

import pytest
import yaml
from rich.console import Console

import derta_jax.objectives
from derta_jax import config as config_module
from derta_jax.config import config_keys, objective_class, objective_names
from derta_jax.data.dataset import load_dataset
from derta_jax.data.inspect import inspect_row
from derta_jax.data.pipeline import training_rows
from derta_jax.interop.tokenizer import load_tokenizer
from derta_jax.objectives.objective import of_config
from derta_jax.training.loop import train
from tests.conftest import write_example_rows
from tests.training.conftest import make_run_config, metrics_of

PAGE = (Path(__file__).parents[2] / "docs" / "objectives.md").read_text(encoding="utf-8")


@pytest.fixture
def early_sft(tmp_path, monkeypatch):
    """The page's file where objectives lie, and what the page's config says."""
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    (section,) = re.findall(r"```yaml\n(.*?)```", PAGE, flags=re.DOTALL)
    assert len(code.splitlines()) < 50
    (tmp_path / "early_sft.py").write_text(code)
    monkeypatch.setattr(derta_jax.objectives, "__path__", [*derta_jax.objectives.__path__, str(tmp_path)])
    config_module.objective_names.cache_clear()
    yield yaml.safe_load(section)["objective"]
    config_module.objective_names.cache_clear()


def test_it_trains(early_sft, tiny_llama, tmp_path):
    rows = write_example_rows(tmp_path / "rows.jsonl")
    config = make_run_config(tiny_llama, rows, tmp_path / "run", objective=early_sft, train={"learning_rate": 1e-2})
    train(config, Console(quiet=True))
    losses = [record["loss_mle"] for record in metrics_of(config)]
    assert losses[-1] < losses[0]


def test_its_keys_are_known_and_its_rows_can_be_looked_at(early_sft, tiny_llama, tmp_path):
    assert "early_sft" in objective_names()
    assert {"objective.early", "objective.early_weight"} <= set(config_keys())
    rows = write_example_rows(tmp_path / "rows.jsonl")
    config = make_run_config(tiny_llama, rows, tmp_path / "run", objective=early_sft)
    tokenizer = load_tokenizer(tiny_llama)
    objective = of_config(config)
    data = training_rows(load_dataset(rows), config, objective, tokenizer)
    assert len(data.rows) == 16
    assert inspect_row(data.rows[0], tokenizer, objective, 1, 0)["recipe"] == "early_sft"


def test_the_table_lists_every_objective_and_its_keys():
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", PAGE, flags=re.MULTILINE))
    assert set(rows) == set(objective_names())
    common = set(config_module.Objective.model_fields)
    derta = set(objective_class("derta").model_fields)
    for name, text in rows.items():
        own = set(objective_class(name).model_fields) - common - (derta if name != "derta" else set())
        assert name == "derta" or all(f"`{key}`" in text for key in own), name


def test_an_unknown_objective_is_told_with_the_nearest_one(tiny_llama, tmp_path):
    with pytest.raises(ValueError, match=r"no objective 'dop' \(there are .*\), did you mean 'dpo'|no objective 'dop'"):
        make_run_config(tiny_llama, tmp_path, tmp_path / "run", objective={"name": "dop"})
