"""Rows as tokens: what each token is part of, and that generation will read what training saw."""

import itertools

import numpy as np
import pytest

from derta_jax.config import Data
from derta_jax.data.examples import AuthorsRow
from derta_jax.data.recipes import Row, rows_from_examples
from derta_jax.data.template import Template
from derta_jax.data.tokenise import Region, TokenRow, tokenise
from derta_jax.errors import UserError
from derta_jax.interop.tokenizer import Tokenizer, load_tokenizer
from tests.conftest import write_tokenizer

DEFAULT = Data.model_fields["template"].default
CHAT = (
    "{{ bos_token }}{% for message in messages %}<{{ message.role }}> {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
PREFIXED = Row("r", "derta", "How?", "Sorry, I cannot.", "First do one thing,\nthen", prefix_words=5)
RTO = Row("r", "derta", "How?", "First do one thing.", stream="rto")
HELPFUL = Row("r", "helpful", "How?", "Take paper.")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(directory, chat_template=CHAT)
    return load_tokenizer(directory)


@pytest.fixture(scope="module")
def tokens(tokenizer):
    """One row's tokens under a template."""

    def make(row: Row, template: str = DEFAULT, sequence_length: int = 1000) -> TokenRow:
        [made] = tokenise([row], tokenizer, Template(template, tokenizer), sequence_length)
        return made

    return make


@pytest.fixture(scope="module")
def regions(tokenizer, tokens):
    """A row's text by region, in order; bos and eos by their names."""

    def split(row: Row, template: str = DEFAULT) -> list[tuple[str, str]]:
        made = tokens(row, template)
        bounds = [0, *(np.flatnonzero(np.diff(made.regions)) + 1), len(made)]
        return [
            (Region(made.regions[start]).name.lower(), tokenizer.hf.decode(made.token_ids[start:end]))
            for start, end in itertools.pairwise(bounds)
        ]

    return split


def test_an_mle_row_is_prompt_then_harmful_prefix_then_response_then_eos(regions):
    assert regions(PREFIXED) == [
        ("prompt", r"<s>[INST] How? [\INST]"),
        ("harmful_prefix", " First do one thing,\nthen"),
        ("response", " Sorry, I cannot."),
        ("eos", "</s>"),
    ]


@pytest.mark.parametrize("row", [HELPFUL, RTO, Row("r", "rto", "How?", "Sorry, I cannot.")])
def test_without_a_prefix_the_response_follows_the_prompt(regions, row):
    assert regions(row) == [
        ("prompt", r"<s>[INST] How? [\INST]"),
        ("response", f" {row.response}"),
        ("eos", "</s>"),
    ]


def test_an_authors_row_keeps_its_own_template_and_spaces(regions):
    example = AuthorsRow("a", r"[INST] How? [\INST] First do", " Sorry, no.<|end_of_text|>", rto=False)
    [row] = rows_from_examples([example], "derta", seed=0)
    assert regions(row, "Q: {prompt}") == [
        ("prompt", r"<s>[INST] How? [\INST]"),
        ("harmful_prefix", " First do"),
        ("response", " Sorry, no."),
        ("eos", "</s>"),
    ]


def test_the_authors_released_rows_learn_their_text_alone(regions, shared_data):
    from derta_jax.data.examples import read_examples

    examples = read_examples([shared_data / "derta_example_rows.jsonl"])
    for example, row in zip(examples, rows_from_examples(examples, "derta", seed=0), strict=True):
        assert isinstance(example, AuthorsRow)
        text = dict(regions(row))
        assert "<s>" + example.prefix == text["prompt"] + text.get("harmful_prefix", "")
        assert example.text == text["response"] + "<|end_of_text|>"


def test_a_token_that_ends_in_the_response_is_part_of_it(regions):
    row = Row("r", "authors", "How?", "ry, no.", " Sor", templated=True)
    assert regions(row)[1:] == [("response", " Sorry, no."), ("eos", "</s>")]


@pytest.mark.parametrize("row", [PREFIXED, RTO, HELPFUL])
def test_labels_are_on_every_response_token_and_on_eos_alone(tokens, row):
    made = tokens(row)
    assert list(made.labelled) == [region in (Region.RESPONSE, Region.EOS) for region in made.regions]


@pytest.mark.parametrize("row", [PREFIXED, RTO, HELPFUL])
def test_eos_closes_each_row_and_is_learned(tokens, tokenizer, row):
    made = tokens(row)
    assert made.token_ids[-1] == tokenizer.eos_id
    assert made.labelled[-1]


def test_eos_is_learned_where_it_is_also_the_padding_token(tmp_path):
    write_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    tokenizer.hf.pad_token = tokenizer.hf.eos_token
    [made] = tokenise([HELPFUL], tokenizer, Template(DEFAULT, tokenizer), 1000)
    assert made.token_ids[-1] == tokenizer.hf.pad_token_id
    assert made.labelled[-1]


@pytest.mark.parametrize("template", [DEFAULT, "chat", "Q: {prompt}\nA:"])
@pytest.mark.parametrize("row", [PREFIXED, RTO, HELPFUL])
def test_what_generation_reads_is_how_each_row_starts(tokens, tokenizer, template, row):
    made = tokens(row, template)
    prompt = tokenizer.prompt_ids(Template(template, tokenizer).render(row.prompt))
    assert list(made.token_ids[: len(prompt)]) == prompt
    assert set(made.regions[: len(prompt)]) == {Region.PROMPT}
    assert made.regions[len(prompt)] != Region.PROMPT


def test_tokens_are_those_of_the_text_as_it_reads(tokens, tokenizer):
    text = r"[INST] How? [\INST] First do one thing," + "\nthen Sorry, I cannot."
    assert list(tokens(PREFIXED).token_ids) == [tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id]


@pytest.mark.parametrize("text", ["Café naïve", "東京 😀", "a  b \n\n c"])
def test_regions_meet_at_the_right_character_of_any_text(regions, text):
    row = Row("r", "derta", text, text, text, prefix_words=1)
    assert regions(row) == [
        ("prompt", rf"<s>[INST] {text} [\INST]"),
        ("harmful_prefix", f" {text}"),
        ("response", f" {text}"),
        ("eos", "</s>"),
    ]


def test_an_empty_prefix_leaves_no_double_space(regions):
    row = Row("r", "derta", "How?", "Sorry.", prefix_words=0)
    assert regions(row)[1:] == [("response", " Sorry."), ("eos", "</s>")]


def test_paper_mode_keeps_the_double_space_of_an_empty_prefix_outside_the_response(regions):
    row = Row("r", "derta", "How?", "Sorry.", prefix_words=0, double_space=True)
    assert regions(row)[1:] == [("harmful_prefix", " "), ("response", " Sorry."), ("eos", "</s>")]


def test_a_row_that_is_too_long_is_cut_on_the_right_and_says_so(tokens):
    whole, cut = tokens(PREFIXED), tokens(PREFIXED, sequence_length=20)
    assert list(cut.token_ids) == list(whole.token_ids[:20])
    assert list(cut.regions) == list(whole.regions[:20])
    assert cut.truncated
    assert not whole.truncated


def test_a_row_that_just_fits_is_not_cut(tokens):
    length = len(tokens(HELPFUL))
    assert not tokens(HELPFUL, sequence_length=length).truncated
    assert tokens(HELPFUL, sequence_length=length - 1).truncated


def test_a_row_cut_inside_its_prompt_has_no_label(tokens):
    assert not tokens(HELPFUL, sequence_length=5).labelled.any()


def test_bos_starts_each_row_once_where_the_tokenizer_has_one(tokens, tokenizer):
    ids = list(tokens(HELPFUL).token_ids)
    assert ids[0] == tokenizer.bos_id
    assert ids.count(tokenizer.bos_id) == 1


def test_bos_is_not_doubled_where_the_chat_template_brings_its_own(tokens, tokenizer):
    ids = list(tokens(HELPFUL, "chat").token_ids)
    assert ids[0] == tokenizer.bos_id
    assert ids.count(tokenizer.bos_id) == 1


def test_a_tokenizer_without_bos_gives_rows_without_bos(tmp_path):
    write_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    without = Tokenizer(tokenizer.hf, tokenizer.directory, tokenizer.eos_id, bos_id=None)
    [made] = tokenise([HELPFUL], without, Template(DEFAULT, without), 1000)
    assert list(made.token_ids) == [*tokenizer.encode(r"[INST] How? [\INST] Take paper."), tokenizer.eos_id]


def test_an_answer_stands_where_the_chat_template_puts_it(regions):
    assert regions(PREFIXED, "chat") == [
        ("prompt", "<s><user> How?\n<assistant>"),
        ("harmful_prefix", " First do one thing,\nthen"),
        ("response", " Sorry, I cannot."),
        ("eos", "</s>"),
    ]


def test_a_tokenizer_without_chat_template_cannot_chat(tmp_path):
    write_tokenizer(tmp_path)
    with pytest.raises(UserError, match=f"the tokenizer in {tmp_path} has no chat template: set data.template"):
        Template("chat", load_tokenizer(tmp_path))


def test_braces_in_a_prompt_are_text(regions):
    row = Row("r", "helpful", "What is {prompt} in {}?", "A name.")
    assert regions(row)[0] == ("prompt", r"<s>[INST] What is {prompt} in {}? [\INST]")


def test_rows_come_in_order_whatever_the_chunk(tokenizer):
    rows = [Row(f"r-{i}", "helpful", f"How {i}?", "So." * i) for i in range(1, 12)]
    template = Template(DEFAULT, tokenizer)
    chunked, whole = ([*tokenise(rows, tokenizer, template, 1000, chunk=chunk)] for chunk in (4, 512))
    assert [row.id for row in chunked] == [row.id for row in rows]
    assert [row.token_ids.tolist() for row in chunked] == [row.token_ids.tolist() for row in whole]


def test_a_token_row_remembers_what_it_was_made_of(tokens):
    made = tokens(PREFIXED)
    assert (made.id, made.recipe, made.stream, made.prefix_words) == ("r", "derta", "mle", 5)
    assert tokens(RTO).stream == "rto"
