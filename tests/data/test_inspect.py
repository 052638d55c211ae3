"""What a row becomes, shown to programs and to people as training will see it."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from derta_jax.cli import main
from derta_jax.data.inspect import NO_LABEL, inspect_row
from derta_jax.data.loader import Batches
from derta_jax.data.packing import Layout
from derta_jax.data.recipes import Row
from derta_jax.data.template import Template
from derta_jax.data.tokenise import TokenRow, tokenise
from derta_jax.interop.tokenizer import Tokenizer, load_tokenizer, refusal_token_id
from derta_jax.objectives.derta import Derta
from tests.conftest import triple, write_tokenizer

TINY = Path(__file__).parents[2] / "configs" / "tiny.yaml"
TEMPLATE = r"[INST] {prompt} [\INST]"
PREFIXED = Row("p", "derta", "How?", "Sorry, I cannot.", "First do one thing,", prefix_words=4)
RTO = Row("r", "derta", "How?", "First do one thing.", stream="rto")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(directory)
    return load_tokenizer(directory)


@pytest.fixture(scope="module")
def refusal_id(tokenizer) -> int:
    return refusal_token_id(tokenizer, "Sorry")


@pytest.fixture(scope="module")
def tokens(tokenizer) -> Callable[[Row], TokenRow]:
    return lambda row: next(tokenise([row], tokenizer, Template(TEMPLATE, tokenizer), 1000))


@pytest.fixture(scope="module")
def inspected(tokenizer, refusal_id, tokens) -> Callable[..., dict[str, Any]]:
    def inspect(row: Row, **objective) -> dict[str, Any]:
        return inspect_row(tokens(row), tokenizer, Derta(**objective), refusal_id, seed=0)

    return inspect


@pytest.fixture
def derta_inspect(tokenizer, rows_file, capsys) -> Callable[..., str]:
    """What `derta inspect` prints for the rows file."""

    def run(*words: str) -> str:
        arguments = [str(TINY), f"model.path={tokenizer.directory}", f"data.path={rows_file}", *words]
        assert main(["inspect", *arguments]) == 0
        return capsys.readouterr().out

    return run


def learned(row: dict[str, Any]) -> dict[str, list[int]]:
    """Labels by region."""
    pairs = list(zip(row["regions"], row["labels"], strict=True))
    return {region: [label for other, label in pairs if other == region] for region in row["regions"]}


def test_a_row_has_the_keys_that_programs_read(inspected):
    row = inspected(PREFIXED)
    assert {"id", "recipe", "tokens", "token_ids", "regions", "labels", "weights"} <= row.keys()
    assert (row["id"], row["recipe"], row["stream"], row["prefix_words"]) == ("p", "derta", "mle", 4)


def test_every_token_has_its_text_region_label_and_weight(inspected):
    row = inspected(PREFIXED)
    per_token = ("tokens", "token_ids", "regions", "labels", "weights")
    assert {len(row[key]) for key in per_token} == {row["counts"]["total"]}


def test_an_inspected_row_is_json(inspected):
    row = inspected(RTO)
    assert json.loads(json.dumps(row)) == row


def test_the_tokens_of_a_row_read_like_its_text(inspected):
    assert "".join(inspected(PREFIXED)["tokens"]) == (
        r"<s>[INST] How? [\INST] First do one thing, Sorry, I cannot.</s>"
    )


def test_an_mle_row_learns_its_own_response_and_eos(inspected, tokenizer):
    row = inspected(PREFIXED)
    labels = learned(row)
    assert labels["response"] == tokenizer.encode(" Sorry, I cannot.")
    assert labels["eos"] == [tokenizer.eos_id]


def test_an_rto_row_learns_the_refusal_token_at_every_response_position_and_eos(inspected, refusal_id):
    labels = learned(inspected(RTO))
    assert set(labels["response"]) == {refusal_id}
    assert labels["eos"] == [refusal_id]


@pytest.mark.parametrize("row", [PREFIXED, RTO])
def test_nothing_is_learned_in_prompt_and_harmful_prefix(inspected, row):
    labels = learned(inspected(row))
    assert set(labels["prompt"] + labels.get("harmful_prefix", [])) == {NO_LABEL}


def test_labelled_tokens_of_mle_rows_weigh_one_whatever_the_rto_weight(inspected):
    row = inspected(PREFIXED, rto_weight=3.0)
    assert row["weights"] == [float(label != NO_LABEL) for label in row["labels"]]


def test_labelled_tokens_of_rto_rows_weigh_the_rto_weight(inspected):
    row = inspected(RTO, rto_weight=3.0)
    assert row["weights"] == [3.0 * (label != NO_LABEL) for label in row["labels"]]


def test_a_keep_rate_leaves_that_share_of_the_refusal_labels(inspected):
    full, thinned = inspected(RTO), inspected(RTO, sorry_keep_rate=0.1)
    assert thinned["counts"]["labelled"] == -(-full["counts"]["labelled"] // 10)


def test_the_labels_shown_are_those_of_the_first_epoch(inspected, tokens):
    long = Row("r", "derta", "How?", "First do one thing. " * 5, stream="rto")
    batch = Batches([tokens(long)], Layout(1, 64), Derta(sorry_keep_rate=0.3), seed=0, steps=1)[0]
    labels = inspected(long, sorry_keep_rate=0.3)["labels"]
    assert [label != NO_LABEL for label in labels] == batch["keep"][0, 0, : len(labels)].tolist()


def test_counts_add_up_over_the_regions(inspected):
    counts = inspected(PREFIXED)["counts"]
    assert sum(counts[name] for name in ("prompt", "harmful_prefix", "response", "eos")) == counts["total"]
    assert counts["labelled"] == counts["response"] + counts["eos"]


def test_the_command_prints_one_json_object_a_row(derta_inspect):
    rows = [json.loads(line) for line in derta_inspect("--json").splitlines()]
    assert len(rows) == 2 * 6 + 10
    assert {row["recipe"] for row in rows} == {"derta", "helpful"}


def test_the_command_shows_as_many_rows_as_asked_for(derta_inspect):
    assert len(derta_inspect("--json", "--rows", "4").splitlines()) == 4


def test_the_command_shows_the_rows_of_one_triple(derta_inspect):
    rows = [json.loads(line) for line in derta_inspect("--json", "--id", "triple-3").splitlines()]
    assert [row["id"] for row in rows] == ["triple-3#prefix-0", "triple-3#rto"]


def test_overrides_may_stand_behind_options(derta_inspect):
    rows = [json.loads(line) for line in derta_inspect("--json", "data.recipe=vanilla").splitlines()]
    assert {row["recipe"] for row in rows} == {"vanilla", "helpful"}


def test_people_read_the_decoded_text(derta_inspect):
    shown = derta_inspect("--id", "triple-0", "data.recipe=vanilla")
    assert rf"[INST] {triple(0)['prompt']} [\INST] {triple(0)['safe']}</s>" in shown


def test_people_see_where_the_refusal_is_learned(derta_inspect):
    assert "</s>→Sorry" in derta_inspect("--id", "triple-0#rto")


def test_people_get_three_rows_and_the_counts_of_all(derta_inspect):
    shown = derta_inspect()
    assert [f"triple-{i}#" in shown for i in range(3)] == [True, True, False]
    table = re.findall(r"^ +(\w+) +(mle|rto) +(\d+)", shown, flags=re.MULTILINE)
    counted = {(recipe, kind): int(rows) for recipe, kind, rows in table}
    assert counted == {("derta", "mle"): 6, ("derta", "rto"): 6, ("helpful", "mle"): 10}


def test_rows_without_a_label_left_are_counted(derta_inspect):
    shown = derta_inspect("train.sequence_length=24", "--rows", "0", "data.recipe=vanilla")
    assert "rows have no label left after cutting and are not trained on" not in shown
    shown = derta_inspect("train.sequence_length=18", "--rows", "0", "data.recipe=vanilla")
    assert "12 rows have no label left after cutting and are not trained on" in shown
