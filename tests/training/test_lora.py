"""Training adapters: the base stays as it is, only adapters are optimised, saved and resumed."""

import io

import jax
import numpy as np
import pytest
from rich.console import Console

from derta_jax.errors import StoppedEarly, UserError
from derta_jax.models.lora import DEFAULT
from derta_jax.training.checkpoint import Checkpoints
from derta_jax.training.loop import train
from derta_jax.training.mesh import single_device_mesh
from derta_jax.training.restore import adapter_of, find_model, load_model
from derta_jax.training.run import describe, prepare_run
from derta_jax.training.start import first_state, frozen_variables
from derta_jax.training.step import GO_ON, cast_votes, to_devices
from tests.conftest import write_tiny_model
from tests.training.conftest import losses_of, make_run_config, metrics_of, stop_after

LORA = {"rank": 4, "alpha": 8, "dropout": 0.1}


@pytest.fixture(scope="module", params=["tiny_llama", "tiny_mixtral"])
def model(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def lora_config(model, example_rows, tmp_path):
    def make(name="run", **sections):
        sections = {"lora": LORA, "train": {"learning_rate": 1e-2}} | sections
        return make_run_config(model, example_rows, tmp_path / name, **sections)

    return make


@pytest.fixture(scope="module")
def trained(model, example_rows, tmp_path_factory, console):
    """A finished run of 6 steps on 8 devices in a row."""
    output = tmp_path_factory.mktemp("trained") / "run"
    config = make_run_config(model, example_rows, output, lora=LORA, train={"learning_rate": 1e-2})
    train(config, console)
    return config


def state_of(config, console):
    run = prepare_run(config, console)
    with Checkpoints(run.output / "checkpoints") as checkpoints:
        return run, first_state(run, checkpoints, console), frozen_variables(run, console)


def test_steps_leave_every_bit_of_the_base_as_it_was(lora_config, console):
    run, state, frozen = state_of(lora_config(), console)
    before, fresh = jax.device_get(frozen), jax.device_get(state.trainable)
    votes = cast_votes(GO_ON, run.mesh)
    with jax.set_mesh(run.mesh):
        for step in range(3):
            state, _ = run.program.step(state, frozen, to_devices(run.batches[step], run.mesh), votes)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(frozen), before)
    moved = jax.tree.map(lambda new, old: bool((np.asarray(new) != old).any()), state.trainable, fresh)
    assert all(jax.tree.leaves(moved))


def test_the_optimizer_holds_adapters_alone_and_the_base_is_in_the_compute_dtype(lora_config, console):
    _, state, frozen = state_of(lora_config(train={"dtype": "bfloat16"}), console)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(frozen["params"])} == {"bfloat16"}
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state.trainable)} == {"float32"}
    adapters = sum(leaf.size for leaf in jax.tree.leaves(state.trainable))
    moments = sum(leaf.size for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim)
    assert moments == 2 * adapters


def test_the_loss_starts_at_the_bases_and_falls(trained, model, example_rows, tmp_path, console):
    full = make_run_config(model, example_rows, tmp_path / "full", train={"steps": 1})
    train(full, console)
    losses = losses_of(trained)
    assert losses[0] == pytest.approx(losses_of(full)[0], rel=1e-6)
    assert losses[-1] < 0.9 * losses[0]


def test_a_stopped_run_goes_on_to_the_same_bits_with_dropout(trained, lora_config, console, monkeypatch):
    halves = lora_config("halves")
    with monkeypatch.context() as patch:
        stop_after(3, patch)
        with pytest.raises(StoppedEarly):
            train(halves, console)
    train(halves, console)
    assert losses_of(halves) == losses_of(trained)


def test_another_mesh_trains_on_the_same_losses_dropout_included(trained, lora_config, console):
    split = lora_config("split", mesh={"fsdp": 4, "tensor": 2})
    train(split, console)
    np.testing.assert_allclose(losses_of(split), losses_of(trained), rtol=1e-5)


def test_a_finished_run_does_not_load_its_base_again(trained):
    console = Console(record=True, width=200, file=io.StringIO())
    train(trained, console)
    printed = console.export_text()
    assert "nothing left to do" in printed
    assert "loaded" not in printed


def test_a_run_with_another_rank_is_not_resumed(trained, console):
    with pytest.raises(UserError, match=r"lora\.rank: 4 in the checkpoint, 8 now"):
        train(trained.model_copy(update={"lora": trained.lora.model_copy(update={"rank": 8})}), console)


def test_the_plan_says_what_is_trained(lora_config, console):
    run = prepare_run(lora_config(), console)
    adapters = sum(leaf.size for leaf in jax.tree.leaves(run.program.abstract_trainable))
    assert f"rank 4, alpha 8, dropout 0.1: {adapters:,} parameters are trained" in describe(run)


def test_a_checkpoint_holds_the_adapter_that_evaluation_merges(trained, console):
    source = find_model(trained.train.output)
    assert source.base is not None
    assert source.base.path == trained.model.path
    run, state, _ = state_of(trained, console)
    adapter = adapter_of(source, run.mesh)
    jax.tree.map(np.testing.assert_array_equal, adapter.factors, state.trainable["lora"]["layers"][DEFAULT])
    assert set(adapter.scales.values()) == {2.0}


def test_a_base_in_four_bits_is_trained_on_and_merged_whole(tmp_path, example_rows, console):
    model = write_tiny_model(tmp_path / "model", hidden_size=64, head_dim=16, intermediate_size=128)
    sections = {"lora": LORA | {"quantise": "nf4"}, "train": {"learning_rate": 1e-2}}
    config = make_run_config(model, example_rows, tmp_path / "run", **sections)
    train(config, console)
    losses = losses_of(config)
    assert losses[-1] < 0.9 * losses[0]
    assert "the model's are frozen in nf4" in describe(prepare_run(config, console))
    merged = load_model(find_model(config.train.output), "float32", single_device_mesh())
    base = load_model(find_model(model), "float32", single_device_mesh())
    np.testing.assert_array_equal(merged["embed"], base["embed"])
    assert 0 < np.abs(merged["layers"]["gate"] - base["layers"]["gate"]).max() < 0.1


def test_a_mixtures_steps_log_the_load_balancing_loss(run_config, tiny_mixtral, console):
    config = run_config(model={"path": str(tiny_mixtral)}, objective={"router_aux_weight": 0.1})
    train(config, console)
    records = metrics_of(config)
    assert all(record["loss_aux"] >= 2 for record in records)
    assert records[-1]["loss"] < records[0]["loss"]
    assert "2 of 4 for each token, none dropped; load-balancing loss × 0.1" in describe(prepare_run(config, console))
