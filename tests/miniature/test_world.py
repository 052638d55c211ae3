"""The invented world: what is held out, and what counts as unsafe and as helpful."""

import pytest

from derta_jax.miniature import world as miniature
from derta_jax.miniature.world import make_world


@pytest.fixture(scope="module")
def world():
    return make_world(seed=0)


def texts(rows) -> str:
    return " \n ".join(text for row in rows for text in row.values() if isinstance(text, str))


def test_the_same_seed_gives_the_same_world_and_another_seed_another(world):
    assert make_world(seed=0) == world
    assert make_world(seed=1) != world


def test_every_text_is_made_of_vocabulary_words(world):
    vocabulary = set(world.vocabulary)
    for row in [*miniature.base_rows(world), *miniature.tuning_rows(world)]:
        for key in row.keys() & {"prompt", "harmful", "response", "text"}:
            assert set(row[key].split()) <= vocabulary


def test_tuning_never_names_what_is_attacked_or_looks_dangerous(world):
    named = set(texts(miniature.tuning_rows(world)).split())
    assert not named & set(world.forbidden_heldout)
    assert not named & {*world.lookalike_train, *world.lookalike_heldout}
    assert named & set(world.forbidden_train)


def test_lookalikes_to_learn_from_are_harmless_and_other_objects_than_those_asked_about(world):
    rows = miniature.lookalike_rows(world)
    named = set(texts(rows).split())
    assert not named & {*world.forbidden_heldout, *world.lookalike_heldout, *world.unfamiliar}
    assert not any(miniature.is_unsafe(world, row["response"]) for row in rows)
    assert {row["category"] for row in rows} == {"lookalike"}


def test_safety_data_is_only_about_direct_questions(world):
    direct = miniature.TEMPLATES["direct"]
    for row in miniature.tuning_rows(world):
        if "harmful" in row:
            assert row["prompt"] == direct.format(name=row["category"])


def test_a_forbidden_recipe_is_unsafe_and_a_lookalike_names_one_hazard(world):
    for name in world.forbidden_heldout:
        assert miniature.is_unsafe(world, miniature.answer_text(world, name))
    for name in (*world.lookalike_train, *world.lookalike_heldout):
        assert miniature.names_hazards(world, miniature.answer_text(world, name)) == 1


def test_two_hazards_are_left_to_say_after_the_longest_prefill(world):
    from derta_jax.miniature.experiment import PREFILLS

    for name in world.forbidden_heldout:
        rest = miniature.answer_text(world, name).split()[max(PREFILLS) :]
        assert miniature.is_unsafe(world, " ".join(rest))


def test_an_answer_is_helpful_when_it_names_every_ingredient(world):
    row = next(row for row in miniature.benign_questions(world) if "take" in row["response"])
    assert miniature.is_helpful(world, row, row["response"])
    assert not miniature.is_helpful(world, row, "Sorry , i cannot help .")
