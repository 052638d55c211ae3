"""Whole runs with `data.packing=tree`."""

import dataclasses

import numpy as np
import pytest
from rich.console import Console

from derta_jax.errors import UserError
from derta_jax.objectives.derta import Derta
from derta_jax.training.loop import train
from derta_jax.training.run import describe, prepare_run
from tests.training.conftest import losses_of, make_run_config

ALL_AT_ONCE = {"batch_size": 64, "sequence_length": 192, "steps": 3}


@pytest.mark.parametrize("objective", [{"name": "dpo"}, {"name": "derta"}], ids=lambda objective: objective["name"])
def test_a_run_has_the_losses_it_has_without_trees(objective, tiny_llama, example_rows, tmp_path, console):
    """All rows are in each batch; DPO's reference is computed before the first step, row by row."""
    losses = []
    for packing in ("rows", "tree"):
        sections = {"objective": objective, "data": {"packing": packing}, "train": ALL_AT_ONCE}
        config = make_run_config(tiny_llama, example_rows, tmp_path / packing, **sections)
        train(config, console)
        losses.append(losses_of(config))
    assert losses[1] == pytest.approx(losses[0], rel=2e-5)


def test_the_saving_is_said(tiny_llama, example_rows, tmp_path, console):
    config = make_run_config(tiny_llama, example_rows, tmp_path / "run", data={"packing": "tree"}, train=ALL_AT_ONCE)
    run = prepare_run(config, console)
    saved = run.batches.trunks.sum() / sum(len(row) for row in run.data.rows)
    assert saved > 0.05
    assert f"(trees save {saved:.1%} of the tokens)" in describe(run)


def test_a_run_that_began_without_trees_does_not_go_on_with_them(tiny_llama, example_rows, tmp_path, console):
    """Which rows are drawn together is another matter with them."""
    train(make_run_config(tiny_llama, example_rows, tmp_path / "run"), console)
    changed = make_run_config(tiny_llama, example_rows, tmp_path / "run", data={"packing": "tree"})
    with pytest.raises(UserError, match=r"data\.packing"):
        train(changed, console)


def test_a_window_is_not_counted_by_columns(tiny_mistral, example_rows, tmp_path):
    sections = {"data": {"packing": "tree"}, "train": {"attention": "blocks"}}
    config = make_run_config(tiny_mistral, example_rows, tmp_path / "run", **sections)
    with pytest.raises(UserError, match="which is wrong in a tree's branches: set it to xla"):
        prepare_run(config, Console(quiet=True))


def test_streams_that_are_drawn_apart_have_no_trees(tiny_llama, example_rows, tmp_path):
    sections = {"data": {"packing": "tree"}, "lora": {"rank": 4}, "objective": {"name": "security_vectors"}}
    config = make_run_config(tiny_llama, example_rows, tmp_path / "run", **sections)
    with pytest.raises(UserError, match="objective security_vectors draws its streams apart"):
        prepare_run(config, Console(quiet=True))


def test_a_token_that_counts_in_both_rows_is_not_shared_in_silence(tiny_llama, example_rows, tmp_path, console):
    class All(Derta):
        def keep(self, row, rng, padded_length):
            return np.ones(len(row), bool)

    config = make_run_config(tiny_llama, example_rows, tmp_path / "run", data={"packing": "tree"}, train=ALL_AT_ONCE)
    batches = dataclasses.replace(prepare_run(config, console).batches, objective=All())
    with pytest.raises(UserError, match="objective derta counts tokens that trees share: triple-"):
        batches[0]
