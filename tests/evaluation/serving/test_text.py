"""The text of an answer does not depend on how its tokens come, and ends where the first stop string begins."""

import numpy as np
import pytest

from derta_jax.evaluation.serving.text import AnswerText
from derta_jax.interop.tokenizer import Tokenizer, load_tokenizer
from tests.conftest import write_tokenizer

TEXT = "First do one thing,\nthen another thing, then go away quickly. Café naïve 東京 😀 kite"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(directory)
    return load_tokenizer(directory)


def said(tokenizer, token_ids, stops=(), at_once=1):
    """The parts of an answer whose tokens come so many at once, until it stops."""
    text, parts = AnswerText(tokenizer, stops), []
    for start in range(0, len(token_ids), at_once):
        parts.append(text.add(token_ids[start : start + at_once]))
        if text.stopped:
            return parts, text
    return [*parts, text.finish()], text


@pytest.mark.parametrize("at_once", [1, 2, 3, 8, 100])
def test_the_parts_are_the_whole(tokenizer, at_once):
    token_ids = tokenizer.encode(TEXT)
    parts, text = said(tokenizer, token_ids, at_once=at_once)
    assert "".join(parts) == TEXT
    assert text.tokens == len(token_ids)
    assert not any("�" in part for part in parts)


@pytest.mark.parametrize("at_once", [1, 2, 5, 100])
def test_any_tokens_give_what_decoding_all_of_them_gives(tokenizer, at_once):
    for token_ids in np.random.default_rng(0).integers(0, 400, (200, 20)).tolist():
        parts, _ = said(tokenizer, token_ids, at_once=at_once)
        assert "".join(parts) == tokenizer.decode(token_ids)


@pytest.mark.parametrize("at_once", [1, 2, 3, 7, 100])
@pytest.mark.parametrize(
    ("stops", "expected"),
    [
        (["then"], "First do one thing,\n"),
        (["ng,\nthen an"], "First do one thi"),
        (["quick", "thing"], "First do one "),
        (["a" * 50, "😀"], "First do one thing,\nthen another thing, then go away quickly. Café naïve 東京 "),
        (["京 😀 k"], "First do one thing,\nthen another thing, then go away quickly. Café naïve 東"),
        (["F"], ""),
        (["kite"], TEXT[: -len("kite")]),
        (["kites", "irst of all"], TEXT),
        (["one thing,\nthen another", "do"], "First "),
        (["one thing,\nthen another", "ing"], "First do one th"),
    ],
    ids=str,
)
def test_an_answer_ends_before_the_stop_string_that_is_complete_first(tokenizer, stops, expected, at_once):
    parts, text = said(tokenizer, tokenizer.encode(TEXT), stops, at_once)
    assert "".join(parts) == expected
    assert text.stopped == (expected != TEXT)


@pytest.mark.parametrize("at_once", [2, 5, 100])
def test_tokens_count_up_to_the_one_that_completes_a_stop_string(tokenizer, at_once):
    token_ids = tokenizer.encode(TEXT)
    _, one_by_one = said(tokenizer, token_ids, ["another"])
    _, together = said(tokenizer, token_ids, ["another"], at_once)
    assert together.tokens == one_by_one.tokens < len(token_ids)
    assert "another" in tokenizer.decode(token_ids[: together.tokens])
    assert "another" not in tokenizer.decode(token_ids[: together.tokens - 1])


def test_random_answers_are_cut_where_plain_search_cuts_them(tokenizer):
    random = np.random.default_rng(1)
    cut = 0
    for token_ids in random.integers(3, 400, (300, 30)).tolist():
        whole = tokenizer.decode(token_ids)
        start = int(random.integers(0, len(whole) - 4))
        stops = [whole[start : start + int(random.integers(1, 4))], "zz", "~"]
        ends = [(whole.index(stop) + len(stop), whole.index(stop)) for stop in stops if stop in whole]
        for at_once in (1, 4, 30):
            parts, text = said(tokenizer, token_ids, stops, at_once)
            assert text.stopped
            assert "".join(parts) == whole[: min(ends)[1]]
        cut += min(ends)[1] < start
    assert cut  # some were cut before the place that was looked at


def test_only_what_may_begin_a_stop_string_is_held_back(tokenizer):
    text = AnswerText(tokenizer, ["thing, then"])
    assert text.add(tokenizer.encode("First do one thing,")) == "First do one "
    assert text.add(tokenizer.encode(" else")) == "thing, else"
    assert text.finish() == ""
