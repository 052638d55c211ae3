"""How triples become rows: the method and its ablations, and draws that depend on nothing but seed and id."""

import pytest

from derta_jax.data.examples import AuthorsRow, Example, Helpful, Triple
from derta_jax.data.recipes import RECIPES, Row, rows_from_examples
from tests.conftest import helpful, triple

HARMFUL = "Take two  sticks,\nthen\tglue them   well."
WORDS = 7


def triples(count: int, harmful: str = HARMFUL) -> list[Example]:
    return [Triple(**triple(i, harmful=harmful)) for i in range(count)]


def rows(examples, recipe: str = "derta", seed: int = 0, paper: bool = False) -> list[Row]:
    return list(rows_from_examples(examples, recipe, seed, paper))


def prefix_lengths(made: list[Row]) -> dict[str, int]:
    return {row.id: row.prefix_words for row in made if row.prefix_words is not None}


def kinds(made: list[Row]) -> list[tuple[str, str]]:
    """What each row learns, and what it reads first."""
    return [
        ("refusal tokens" if row.stream == "rto" else row.response, "prefix" if row.prefix_words is not None else "")
        for row in made
    ]


SAFE = triple(0)["safe"]


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        ("vanilla", [(SAFE, ""), (SAFE, "")]),
        ("recaug", [(SAFE, "prefix"), (SAFE, "prefix")]),
        ("rto", [(SAFE, ""), ("refusal tokens", "")]),
        ("derta", [(SAFE, "prefix"), ("refusal tokens", "")]),
    ],
)
def test_each_recipe_makes_its_two_rows_of_a_triple(recipe, expected):
    assert kinds(rows(triples(1), recipe)) == expected


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_row_answers_the_prompt_of_its_triple_and_says_where_it_is_from(recipe):
    made = rows(triples(3), recipe)
    assert [row.prompt for row in made] == [triple(i)["prompt"] for i in (0, 0, 1, 1, 2, 2)]
    assert {row.recipe for row in made} == {recipe}
    assert [row.id.split("#")[0] for row in made] == [triple(i)["id"] for i in (0, 0, 1, 1, 2, 2)]


@pytest.mark.parametrize("recipe", RECIPES)
def test_row_ids_are_unique(recipe):
    made = rows(triples(20), recipe)
    assert len({row.id for row in made}) == len(made)


def test_an_rto_row_reads_the_whole_harmful_answer_as_its_response():
    row = rows(triples(1), "rto")[1]
    assert (row.response, row.harmful_prefix) == (HARMFUL, "")


def test_recaug_draws_its_two_prefixes_independently():
    lengths = prefix_lengths(rows(triples(50), "recaug"))
    assert any(lengths[f"triple-{i}#prefix-0"] != lengths[f"triple-{i}#prefix-1"] for i in range(50))


def test_a_prefix_is_the_first_k_words_with_the_white_space_inside_kept():
    expected = {
        0: "",
        1: "Take",
        2: "Take two",
        3: "Take two  sticks,",
        4: "Take two  sticks,\nthen",
        5: "Take two  sticks,\nthen\tglue",
        6: "Take two  sticks,\nthen\tglue them",
        7: HARMFUL,
    }
    made = [row for row in rows(triples(200)) if row.stream == "mle"]
    assert {row.prefix_words: row.harmful_prefix for row in made} == expected


def test_white_space_around_a_harmful_answer_is_no_part_of_the_prefix():
    made = rows(triples(50, harmful=f" \n{HARMFUL}\n "), "recaug")
    assert all(row.harmful_prefix == row.harmful_prefix.strip() for row in made)


def test_every_length_from_none_to_all_words_is_about_equally_likely():
    lengths = list(prefix_lengths(rows(triples(4000))).values())
    shares = [lengths.count(k) / len(lengths) for k in range(WORDS + 1)]
    assert sum(shares) == 1
    assert shares == pytest.approx([1 / (WORDS + 1)] * (WORDS + 1), abs=0.02)


def test_draws_do_not_depend_on_order():
    forward, backward = rows(triples(20)), rows(reversed(triples(20)))
    assert prefix_lengths(forward) == prefix_lengths(backward)


def test_draws_do_not_depend_on_neighbours():
    some = triples(20)[5:8]
    alone, among_others = prefix_lengths(rows(some)), prefix_lengths(rows([Helpful(**helpful(1)), *triples(20)]))
    assert alone.items() <= among_others.items()


def test_draws_depend_on_the_seed():
    assert prefix_lengths(rows(triples(20), seed=0)) != prefix_lengths(rows(triples(20), seed=1))


def test_draws_do_not_depend_on_the_recipe():
    derta, recaug = prefix_lengths(rows(triples(20), "derta")), prefix_lengths(rows(triples(20), "recaug"))
    assert derta.items() <= recaug.items()


def test_draws_are_the_same_on_every_machine():
    assert list(prefix_lengths(rows(triples(8))).values()) == [3, 6, 1, 0, 4, 6, 0, 7]


@pytest.mark.parametrize("paper", [False, True])
def test_helpful_and_authors_rows_are_the_same_in_all_recipes(paper):
    examples = [
        Helpful(**helpful(1)),
        AuthorsRow("a-1", "[INST] How? [\\INST] First,", " Sorry, no.<|end_of_text|>", rto=False),
        AuthorsRow("a-2", "[INST] How? [\\INST]", " First, take it.<|end_of_text|>", rto=True),
    ]
    made = [rows(examples, recipe, paper=paper) for recipe in RECIPES]
    assert made == [made[0]] * len(RECIPES)


def test_a_helpful_row_is_its_prompt_and_response():
    assert rows([Helpful(**helpful(3))]) == [Row("helpful-3", "helpful", helpful(3)["prompt"], helpful(3)["response"])]


@pytest.mark.parametrize("end", ["[\\INST]", "[/INST]"])
def test_an_authors_row_is_split_into_prompt_and_harmful_prefix_behind_the_template(end):
    [row] = rows([AuthorsRow("a", f"[INST] How? {end} First, take", " Sorry.<|end_of_text|>", rto=False)])
    assert (row.prompt, row.harmful_prefix, row.response) == (f"[INST] How? {end}", " First, take", " Sorry.")
    assert row.templated


def test_an_authors_row_without_template_is_all_prompt():
    [row] = rows([AuthorsRow("a", "Question: how?", " So.", rto=True)])
    assert (row.prompt, row.harmful_prefix, row.response, row.stream) == ("Question: how?", "", " So.", "rto")


def test_paper_mode_leaves_each_third_triple_without_prefix_and_with_a_double_space():
    made = [row for row in rows(triples(30), paper=True) if row.stream == "mle"]
    assert [row.prefix_words == 0 for row in made] == [i % 3 == 0 for i in range(30)]
    assert [row.double_space for row in made] == [i % 3 == 0 for i in range(30)]


def test_paper_mode_draws_one_to_n_minus_two_words():
    made = rows(triples(300), paper=True)
    assert set(prefix_lengths(made).values()) == {0, *range(1, WORDS - 1)}


def test_paper_mode_counts_thirds_over_triples_alone():
    one, two, three, four = triples(4)
    between = rows([one, Helpful(**helpful(1)), two, Helpful(**helpful(2)), three, four], paper=True)
    assert prefix_lengths(between) == prefix_lengths(rows([one, two, three, four], paper=True))


@pytest.mark.parametrize("recipe", RECIPES)
def test_paper_mode_leaves_out_all_rows_of_a_triple_with_a_short_harmful_answer(recipe):
    short, long = Triple(**triple(0, harmful="Take it.")), Triple(**triple(1, harmful="Take it now."))
    made = rows([short, long], recipe, paper=True)
    assert {row.id.split("#")[0] for row in made} == {"triple-1"}
    assert len(made) == 2


@pytest.mark.parametrize("recipe", RECIPES)
def test_otherwise_a_short_harmful_answer_is_as_good_as_any(recipe):
    assert len(rows([Triple(**triple(0, harmful="No"))], recipe)) == 2
