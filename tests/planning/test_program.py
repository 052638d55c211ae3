"""The planned step is the trained step: planning's program, made of shapes alone, is the one that a run compiles."""

import dataclasses
import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import pytest
from rich.console import Console

from derta_jax.config import RunConfig
from derta_jax.data.loader import BATCH_DTYPES
from derta_jax.models.config import ModelConfig
from derta_jax.planning.compiled import full_batch
from derta_jax.training.checkpoint import Checkpoints
from derta_jax.training.mesh import make_mesh
from derta_jax.training.program import Program, make_program
from derta_jax.training.run import Run, prepare_run
from derta_jax.training.start import first_state, frozen_variables
from derta_jax.training.step import GO_ON, TrainState, cast_votes, to_devices
from tests.conftest import write_example_rows, write_tiny_model
from tests.training.conftest import make_run_config

QUIET = Console(quiet=True)
LORA = {"rank": 4, "alpha": 8, "dropout": 0.1}
KINDS: dict[str, dict[str, Any]] = {
    "full": {},
    "full on a mesh of three axes": {"mesh": {"data": 2, "tensor": 2}, "train": {"accumulation": 2, "remat": "full"}},
    "packed, in bfloat16": {"data": {"packing": "rows"}, "train": {"dtype": "bfloat16", "optimizer_dtype": "bfloat16"}},
    "lora": {"lora": LORA, "mesh": {"tensor": 2}, "train": {"dtype": "bfloat16", "remat": "full"}},
    "nf4": {"lora": LORA | {"quantise": "nf4"}, "mesh": {"tensor": 2}, "train": {"dtype": "bfloat16"}},
}


class Trained(NamedTuple):
    """A run before its first step, with all that the step is called with."""

    config: RunConfig
    run: Run
    state: TrainState
    frozen: dict[str, Any]
    batch: dict[str, jax.Array]
    votes: jax.Array


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """Wide enough for a block of 4-bit codes."""
    directory = tmp_path_factory.mktemp("tiny") / "llama64"
    return write_tiny_model(directory, hidden_size=64, head_dim=16, intermediate_size=128)


@pytest.fixture(scope="module")
def begin(model, tmp_path_factory) -> Callable[[str], Trained]:
    rows = write_example_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl")

    @functools.cache
    def prepared(kind: str) -> Trained:
        if "quantise" in KINDS[kind].get("lora", {}):
            pytest.importorskip("qwix")
        sections = {"data": {"packing": "none"}} | KINDS[kind]
        config = make_run_config(model, rows, tmp_path_factory.mktemp("runs") / "run", **sections)
        run = prepare_run(config, QUIET)
        with Checkpoints(run.output / "checkpoints") as checkpoints:
            state = first_state(run, checkpoints, QUIET)
        frozen = frozen_variables(run, QUIET)
        return Trained(config, run, state, frozen, to_devices(run.batches[0], run.mesh), cast_votes(GO_ON, run.mesh))

    return prepared


@pytest.fixture(params=KINDS)
def trained(request, begin) -> Trained:
    return begin(request.param)


def planned(trained: Trained) -> Program:
    """Made as planning makes it, from a config and an architecture, and of the data only what planning cannot know."""
    config, run = trained.config, trained.run
    architecture: ModelConfig = run.source.config
    mesh = make_mesh(config.mesh, jax.devices())
    batch = full_batch(config, mesh)
    known = {"label_capacity": run.batches.label_capacity}
    if config.data.packing == "rows":
        known["sequences"] = run.batches.sequences
    return make_program(
        config, architecture, mesh, dataclasses.replace(batch, **known), run.refusal_id, config.train.steps or 1
    )


def placed(tree: Any) -> Any:
    """Shape, dtype and place of every leaf."""
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype.name, leaf.sharding), tree)


def test_the_planned_program_is_the_trained_one(trained):
    text = planned(trained).lower().as_text()
    assert text == trained.run.program.lower().as_text()
    assert "sharding" in text


def test_the_text_tells_programs_apart(begin):
    trained = begin("lora")
    text = planned(trained).lower().as_text()
    other = trained.config.model_copy(update={"train": trained.config.train.model_copy(update={"remat": "none"})})
    assert planned(trained._replace(config=other)).lower().as_text() != text
    wider = trained.config.model_copy(update={"mesh": trained.config.mesh.model_copy(update={"tensor": 1})})
    assert planned(trained._replace(config=wider)).lower().as_text() != text


def test_it_is_what_the_step_makes_of_the_real_arrays(trained):
    run = trained.run
    with jax.set_mesh(run.mesh):
        of_arrays = run.program.step.lower(trained.state, trained.frozen, trained.batch, trained.votes)
    assert of_arrays.as_text() == planned(trained).lower().as_text()


def test_the_shapes_are_those_of_the_real_arrays(trained):
    program = planned(trained)
    assert placed(program.abstract_state) == placed(trained.state)
    assert placed(program.abstract_frozen) == placed(trained.frozen)
    assert placed(program.abstract_batch) == placed(trained.batch)
    assert {name: array.dtype for name, array in trained.run.batches[0].items()} == BATCH_DTYPES


def test_planning_takes_batches_to_be_as_large_as_those_of_full_rows(trained):
    planned_batch, real = full_batch(trained.config, trained.run.mesh), trained.run.program.batch
    assert (planned_batch.length, planned_batch.accumulation) == (real.length, real.accumulation)
    assert planned_batch.sequences >= real.sequences
    assert planned_batch.label_capacity >= real.label_capacity
    if trained.config.data.packing == "none":
        assert planned_batch.sequences == real.sequences


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_compiles_its_step_once_before_the_first(kind, begin, caplog):
    trained = begin(kind)
    state = jax.tree.map(lambda leaf: leaf.copy(), trained.state)  # a step takes its state over
    caplog.set_level(logging.DEBUG, logger="jax")

    def compiled() -> int:
        return sum("compilation of jit(step)" in record.getMessage() for record in caplog.records)

    with jax.set_mesh(trained.run.mesh), jax.log_compiles():
        step = trained.run.compile_step(QUIET)
        assert compiled() == 1
        for _ in range(2):
            state, metrics = step(state, trained.frozen, trained.batch, trained.votes)
            assert float(metrics["weight_sum"]) > 0
    assert compiled() == 1
    assert int(state.step) == 2


@pytest.mark.parametrize("kind", ["full", "full on a mesh of three axes"])
def test_nothing_is_frozen_where_all_parameters_are_trained(kind, begin):
    assert begin(kind).run.program.abstract_frozen == begin(kind).frozen == {}


def test_codes_of_four_bits_stand_where_the_frozen_linear_layers_were(begin):
    frozen = planned(begin("nf4")).abstract_frozen
    assert sorted(frozen) == ["lora_scale", "nf4", "params"]
    assert {leaf.dtype.itemsize for leaf in jax.tree.leaves(frozen["params"])} == {2}
    assert "uint4" in {leaf.dtype.name for leaf in jax.tree.leaves(frozen["nf4"])}
