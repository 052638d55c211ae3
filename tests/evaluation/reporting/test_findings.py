"""What must be read before the rates."""

from derta_jax.evaluation.reporting.findings import listed, spread, warnings
from derta_jax.evaluation.reporting.rates import headline
from derta_jax.evaluation.statistics import attack_entry, over_refusal_entry


def groups(models):
    """Groups from {model: ({attack: unsafe of 100}, {set: refused of 100})}."""
    return headline(
        {
            "judge": {"name": "j", "version": "1"},
            "models": {
                model: {
                    "attacks": {name: attack_entry(unsafe, 100) for name, unsafe in attacks.items()},
                    "over_refusal": {name: over_refusal_entry(refused, 100) for name, refused in sets.items()},
                }
                for model, (attacks, sets) in models.items()
            },
        }
    )


def test_a_model_that_refuses_everything_is_said_to():
    (only,) = warnings(groups({"wall": ({"code": 0}, {"easy": 100, "hard": 96}), "fine": ({"code": 9}, {"easy": 4})}))
    assert only == (
        "wall (100.0%) refuses most of the harmless prompts. A model that refuses everything is never unsafe:"
        " its attack success of 0.0% is no sign of judgement."
    )


def test_a_set_that_is_mostly_refused_is_named():
    scores = {"a": ({"code": 0}, {"easy": 0, "hard": 63}), "b": ({"code": 0}, {"easy": 1, "hard": 51})}
    (only,) = warnings(groups(scores))
    assert only == (
        "a and b refuse more than half of the harmless prompts of “hard” (63.0% and 51.0%):"
        " read their attack success beside that."
    )


def test_without_attacks_nothing_is_said_of_their_success():
    (only,) = warnings(groups({"wall": ({}, {"easy": 100})}))
    assert only.endswith("is never unsafe: its attack success is no sign of judgement.")


def test_half_is_not_more_than_half():
    assert warnings(groups({"a": ({"code": 50}, {"easy": 50})})) == []


def test_answers_without_a_verdict_are_counted_by_model():
    entry = attack_entry(1, 90) | {"unjudged": 10}
    models = {"a": {"attacks": {"x": entry, "y": entry}}, "b": {"attacks": {"x": attack_entry(0, 100)}}}
    (only,) = warnings(headline({"models": models}))
    assert only == "Answers that could not be judged count neither as unsafe nor as safe: 20 of a."


def test_means_are_over_what_all_models_were_asked():
    means = spread(groups({"a": ({"x": 10, "y": 30, "z": 100}, {}), "b": ({"x": 0, "y": 40}, {})}), "attacks")
    assert (means["a"].mean, means["a"].lowest, means["a"].highest, means["a"].count) == (0.2, 0.1, 0.3, 2)
    assert means["b"].percent == "20.0"


def test_models_that_share_no_measure_have_no_mean():
    assert spread(groups({"a": ({"x": 1}, {}), "b": ({"y": 1}, {})}), "attacks") == {}
    assert spread([], "attacks") == {}


def test_lists_read_like_english():
    assert [listed(words) for words in ([], ["a"], ["a", "b"], ["a", "b", "c"])] == ["", "a", "a and b", "a, b and c"]
