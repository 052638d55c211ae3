"""Held-out figures against the objective that is trained, and against themselves laid out in every other way."""

import itertools
import json
from pathlib import Path
from typing import Any

import jax
import pytest

from derta_jax.config import MeshShape
from derta_jax.data.packing import Layout
from derta_jax.errors import UserError
from derta_jax.interop.hf_load import load_params
from derta_jax.models.decoder import Decoder
from derta_jax.models.lora import DEFAULT, Adapter, abstract_adapter, adapter_variables, init_adapter, target_rows
from derta_jax.objectives.derta import Derta
from derta_jax.objectives.refusal_curve import KINDS
from derta_jax.training.held_out import HeldOut, format_held_out
from derta_jax.training.mesh import make_mesh, single_device_mesh
from tests.objectives.test_derta import LENGTH, Case
from tests.training.conftest import make_run_config

OBJECTIVE = {"rto_weight": 0.7, "sorry_keep_rate": 0.3}
RANK = 4
MESHES = {"fsdp 8": MeshShape(fsdp=8), "fsdp 4 × tensor 2": MeshShape(fsdp=4, tensor=2)}


def make_case(directory, **objective) -> Case:
    """Twelve rows of six triples and four helpful rows; its objective keeps every label, as evaluation does."""
    return Case(directory, "derta", Derta(**OBJECTIVE | {"sorry_keep_rate": 1.0} | objective))


@pytest.fixture(scope="module")
def case(tiny_llama) -> Case:
    return make_case(tiny_llama)


@pytest.fixture(scope="module")
def trained_loss(case) -> float:
    """The mean loss of a train step that holds all rows."""
    return case.ours(case.batch())[0]


@pytest.fixture(scope="module")
def with_curves(case) -> dict:
    """All rows in one packed batch on one device."""
    return evaluate(case, held_out={"refusal_curves": True})


def held_out_of(case: Case, rows=None, mesh=None, model=None, layout=None, held_out=None, **sections) -> HeldOut:
    """Of the case's rows in one packed batch on one device, unless told otherwise."""
    mesh = mesh or single_device_mesh()
    sections = {"objective": OBJECTIVE, "train": {"sequence_length": LENGTH}} | sections
    config = make_run_config(
        case.directory,
        Path("rows.jsonl"),
        Path("run"),
        held_out={"path": "held_out.jsonl"} | (held_out or {}),
        **sections,
    )
    layout = Layout(
        **{
            "batch_size": len(case.rows),
            "sequence_length": LENGTH,
            "shards": mesh.shape["data"] * mesh.shape["fsdp"] * mesh.shape["expert"],
        }
        | (layout or {})
    )
    rows = case.rows if rows is None else rows
    return HeldOut(config, rows, model or Decoder(case.config), case.refusal, layout, mesh)


def evaluate(case: Case, **settings) -> dict:
    return held_out_of(case, **settings).evaluate({"params": case.params})


def by_kind(case: Case, rto: bool) -> list:
    return [row for row in case.rows if (row.stream == "rto") is rto]


def test_the_loss_is_the_objectives_on_the_same_rows_with_every_label(case, trained_loss):
    record = evaluate(case)
    assert record["held_out_loss"] == pytest.approx(trained_loss, rel=1e-6)
    tokens = {rto: sum(int(row.labelled.sum()) for row in by_kind(case, rto)) for rto in (False, True)}
    assert record["held_out_loss"] == pytest.approx(
        (record["held_out_loss_mle"] * tokens[False] + 0.7 * record["held_out_loss_rto"] * tokens[True])
        / (tokens[False] + 0.7 * tokens[True])
    )


@pytest.mark.parametrize("curves", [False, True])
@pytest.mark.parametrize("shape", MESHES.values(), ids=MESHES.keys())
def test_eight_devices_give_the_figures_of_one(case, trained_loss, with_curves, shape, curves):
    mesh = make_mesh(shape)
    held_out = held_out_of(case, mesh=mesh, held_out={"refusal_curves": curves})
    record = held_out.evaluate({"params": load_params(case.directory, case.config, mesh=mesh)})
    assert record["held_out_loss"] == pytest.approx(trained_loss, rel=1e-6)
    if curves:
        assert_curves_equal(record, with_curves)


def assert_curves_equal(one: dict, other: dict) -> None:
    for kind in KINDS:
        pairs = list(zip(one[f"refusal_{kind}"], other[f"refusal_{kind}"], strict=True))
        assert pairs
        for a, b in pairs:
            assert (a["from"], a["to"], a["n"]) == (b["from"], b["to"], b["n"])
            assert a["p"] == pytest.approx(b["p"], rel=1e-5)


LAYOUTS = {
    "one row each": {"packed": False},
    "accumulated": {"accumulation": 4},
    "small batches, the last one not full": {"batch_size": 5},
    "small batches, one row each, accumulated": {"batch_size": 3, "packed": False, "accumulation": 2},
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_figures_do_not_depend_on_the_layout(case, trained_loss, with_curves, layout):
    record = evaluate(case, layout=layout, held_out={"refusal_curves": True})
    assert record["held_out_loss"] == pytest.approx(trained_loss, rel=1e-6)
    assert_curves_equal(record, with_curves)


def test_nor_on_more_sequences_than_there_are_rows(case, trained_loss, with_curves):
    mesh = make_mesh(MeshShape(fsdp=8))
    layout = {"batch_size": 64, "packed": False, "accumulation": 3}
    held_out = held_out_of(case, mesh=mesh, layout=layout, held_out={"refusal_curves": True})
    record = held_out.evaluate({"params": load_params(case.directory, case.config, mesh=mesh)})
    assert record["held_out_loss"] == pytest.approx(trained_loss, rel=1e-6)
    assert_curves_equal(record, with_curves)


def test_a_layout_for_other_devices_than_those_of_the_mesh_is_refused(case):
    with pytest.raises(ValueError, match="8 devices"):
        held_out_of(case, layout={"shards": 8})


def test_asking_for_curves_does_not_change_the_loss(case, with_curves):
    plain = evaluate(case)
    assert plain == pytest.approx({name: with_curves[name] for name in plain}, rel=1e-6)
    assert set(with_curves) - set(plain) == {"refusal_harmful", "refusal_helpful"}


def test_curves_count_every_place_of_harmful_and_of_helpful_answers(case, with_curves):
    helpful = [row for row in case.rows if row.recipe == "helpful"]
    assert len(helpful) == 4 < len(by_kind(case, rto=False))
    for kind, rows in (("harmful", by_kind(case, rto=True)), ("helpful", helpful)):
        assert with_curves[f"refusal_{kind}"][0]["n"] == len(rows)
        assert sum(bucket["n"] for bucket in with_curves[f"refusal_{kind}"]) == sum(row.labelled.sum() for row in rows)


def test_a_safe_answer_is_not_a_helpful_one_though_nothing_harmful_was_said_before_it(tiny_llama):
    case = Case(tiny_llama, "vanilla")
    record = evaluate(case, held_out={"refusal_curves": True})
    assert record["refusal_harmful"] == []
    assert record["refusal_helpful"][0]["n"] == 4


@pytest.mark.parametrize(("rto", "missing"), [(True, "mle"), (False, "rto")])
def test_a_kind_without_rows_has_no_loss_and_no_curve(case, rto, missing):
    record = evaluate(case, rows=by_kind(case, rto), held_out={"refusal_curves": True})
    there = {"mle": "rto", "rto": "mle"}[missing]
    assert record[f"held_out_loss_{missing}"] is None
    assert record["held_out_loss"] == pytest.approx(record[f"held_out_loss_{there}"])
    assert bool(record["refusal_harmful"]) is rto
    assert bool(record["refusal_helpful"]) is not rto


def test_only_the_first_batches_are_looked_at_where_so_many_are_asked_for(case, trained_loss):
    limited = held_out_of(case, layout={"batch_size": 4}, held_out={"batches": 2})
    ids = {row_id for step in range(2) for row_id in limited.batches.row_ids(step)}
    assert (limited.batches.steps, len(ids)) == (2, 8)
    loss = limited.evaluate({"params": case.params})["held_out_loss"]
    assert loss != pytest.approx(trained_loss, rel=1e-3)
    assert loss == pytest.approx(
        evaluate(case, rows=[row for row in case.rows if row.id in ids])["held_out_loss"], rel=1e-6
    )
    assert held_out_of(case, layout={"batch_size": 4}, held_out={"batches": 100}).batches.steps == 4


def test_it_compiles_once_and_gives_the_same_bits_each_time(case):
    held_out = held_out_of(case, layout={"batch_size": 5}, held_out={"refusal_curves": True})
    compiled: Any = held_out._sums
    first = held_out.evaluate({"params": case.params})
    assert held_out.evaluate({"params": case.params}) == first
    moved = jax.tree.map(lambda leaf: leaf * 1.01, case.params)
    assert held_out.evaluate({"params": moved})["held_out_loss"] != first["held_out_loss"]
    assert compiled._cache_size() == 1


def test_adapters_are_evaluated_without_dropout(case):
    config, mesh = case.config, single_device_mesh()
    abstract = abstract_adapter(config, target_rows(config), RANK, mesh)
    fresh = init_adapter({"lora": {"layers": {DEFAULT: abstract}}}, seed=0)["lora"]["layers"][DEFAULT]
    keys = map(jax.random.key, itertools.count())
    factors = jax.tree.map(lambda leaf: leaf + 0.1 * jax.random.normal(next(keys), leaf.shape), fresh)
    adapter = adapter_variables({DEFAULT: Adapter(factors, dict.fromkeys(factors, 2.0))})
    variables = {"params": case.params, **adapter}
    losses = {
        held_out_of(case, model=Decoder(config, lora_dropout=rate, remat="full"), lora={"rank": RANK}).evaluate(
            variables
        )["held_out_loss"]
        for rate in (0.0, 0.5)
    }
    assert len(losses) == 1
    assert losses.pop() != pytest.approx(evaluate(case)["held_out_loss"], rel=1e-3)


def test_a_mixtures_load_balancing_loss_is_left_out(tiny_mixtral):
    case = make_case(tiny_mixtral)
    weighed = {"objective": OBJECTIVE | {"router_aux_weight": 0.5}}
    expected = evaluate(case)["held_out_loss"]
    assert evaluate(case, **weighed)["held_out_loss"] == pytest.approx(expected, rel=1e-6)
    with_curves = evaluate(case, held_out={"refusal_curves": True}, **weighed)
    assert with_curves["held_out_loss"] == pytest.approx(expected, rel=1e-6)


def test_a_run_in_paper_mode_has_the_plain_mean(case):
    paper = {"objective": OBJECTIVE | {"paper": True}, "data": {"packing": "none"}}
    layout = {"packed": False, "batch_size": 3, "accumulation": 3}
    assert evaluate(case, layout=layout, **paper) == pytest.approx(evaluate(case), rel=1e-6)


def test_no_row_with_a_label_is_the_users_mistake(case):
    with pytest.raises(UserError, match=r"held_out\.path: no row of held_out\.jsonl has a labelled token left"):
        held_out_of(case, rows=[])


CURVES: dict[str, Any] = {
    "refusal_harmful": [{"from": n, "to": n, "p": p, "n": 1} for n, p in enumerate((0.91, 0.95, 1.0))],
    "refusal_helpful": [{"from": n, "to": n, "p": p, "n": 1} for n, p in enumerate((0.02, 0.3, 0.0))],
}
LOSSES: dict[str, Any] = {"held_out_loss": 1.23456, "held_out_loss_mle": 1.1, "held_out_loss_rto": 0.3}


def test_the_line_shows_losses_and_the_two_curves_from_first_to_last_bucket():
    assert format_held_out(LOSSES | CURVES) == (
        "held out  loss 1.2346 (mle 1.1000, rto 0.3000)  p(refusal) harmful 0.91 → 1.00 ███, helpful 0.02 → 0.00 ▁▃▁"
    )


def test_the_line_leaves_out_what_there_is_not():
    assert format_held_out(LOSSES) == "held out  loss 1.2346 (mle 1.1000, rto 0.3000)"
    only_mle = LOSSES | CURVES | {"held_out_loss_rto": None, "refusal_harmful": []}
    assert format_held_out(only_mle) == "held out  loss 1.2346 (mle 1.1000)  p(refusal) helpful 0.02 → 0.00 ▁▃▁"


def test_a_model_that_has_diverged_can_be_shown(case):
    broken = jax.tree.map(lambda leaf: leaf * float("nan"), case.params)
    record = held_out_of(case, held_out={"refusal_curves": True}).evaluate({"params": broken})
    assert format_held_out(record).startswith("held out  loss nan (mle nan, rto nan)  p(refusal) harmful nan → nan ???")


def test_figures_are_plain_numbers_that_json_knows(with_curves):
    assert json.loads(json.dumps(with_curves, allow_nan=False)) == with_curves
