"""Which tunings `derta demo` makes, in which order, and what several seeds come to."""

import re

import pytest
from rich.console import Console

from derta_jax.config import objective_class
from derta_jax.errors import UserError
from derta_jax.miniature import vectors
from derta_jax.miniature.methods import TUNINGS, parse_methods
from derta_jax.miniature.seeds import draw_seeds, mean_results, run_seeds, seeds_markdown
from derta_jax.miniature.world import helpful_rows, is_unsafe, make_world, tuning_rows


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("vanilla,recaug,rto,derta", ["vanilla", "recaug", "rto", "derta"]),
        ("dpo", ["vanilla", "dpo"]),
        ("security_vectors, dpo,vanilla", ["derta", "security_vectors", "vanilla", "dpo"]),
        ("derta,derta", ["derta"]),
    ],
)
def test_a_method_comes_after_what_it_begins_with(text, expected):
    assert parse_methods(text) == expected


@pytest.mark.parametrize(("text", "message"), [("dop", "no method 'dop'.*did you mean 'dpo'"), (" , ", "at least one")])
def test_a_method_that_there_is_not_is_refused(text, message):
    with pytest.raises(UserError, match=message):
        parse_methods(text)


def test_every_tuning_is_an_objective_with_its_keys():
    for tuning in TUNINGS.values():
        objective_class(tuning.objective["name"]).model_validate(dict(tuning.objective))


def test_helpful_rows_bring_a_wrong_answer_for_dpo():
    world = make_world(0)
    assert all(row["rejected"] and row["rejected"] != row["response"] for row in helpful_rows(world))
    assert {row["rejected"] == "" for row in tuning_rows(world) if "rejected" in row} == {False}


def a_run(asr: float) -> dict:
    figures = {
        "attacks": {"direct": {"asr": asr}, "code": {"asr": 0.0}},
        "helpfulness": {"benign": {"score": 1.0}},
        "over_refusal": {"colour": {"rate": asr / 2}},
    }
    return {"models": {"DeRTa": figures}}


def test_means_over_seeds_have_the_interval_of_students_t():
    means = mean_results([a_run(0.1), a_run(0.2), a_run(0.3)])
    direct = means["models"]["DeRTa"]["attacks"]["direct"]
    assert direct["mean"] == pytest.approx(20)
    assert direct["half"] == pytest.approx(4.303 * 10 / 3**0.5, rel=1e-4)
    assert means["models"]["DeRTa"]["attacks"]["mean over all"]["mean"] == pytest.approx(10)
    assert re.search(r"\| direct \| 20\.0 ± 24\.8 \|", seeds_markdown(means))


def test_means_are_drawn_with_a_colour_for_each_model(tmp_path):
    run = a_run(0.1)
    run["models"] |= {"vanilla": a_run(0.9)["models"]["DeRTa"]}
    draw_seeds(mean_results([run, run]), tmp_path / "seeds.svg")
    text = (tmp_path / "seeds.svg").read_text()
    assert "#d55e00" in text
    assert "#0072b2" in text


@pytest.mark.parametrize("seeds", [1, 11])
def test_too_few_or_too_many_seeds_are_refused(tmp_path, seeds):
    with pytest.raises(UserError, match="--seeds must be from 2 to 10"):
        run_seeds(tmp_path, seeds, Console(quiet=True), ["vanilla"])


def test_a_users_data_hold_harmful_answers_and_a_task_that_contradicts_what_was_known():
    world = make_world(0)
    harmful = vectors.harmful_samples(world, 1000)
    assert len({row["id"] for row in harmful}) == 1000
    assert all(is_unsafe(world, row["response"]) for row in harmful)
    for row in vectors.new_task(world):
        name = row["id"].partition("/")[0]
        assert world.colours[name] not in row["response"].split()
