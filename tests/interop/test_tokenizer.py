"""The tokenizers of LLaMA 3 and Mistral, and what is wrong with others."""

import itertools
import json
import shutil

import numpy as np
import pytest

from derta_jax.data.recipes import Row
from derta_jax.data.template import Template
from derta_jax.data.tokenise import Region, tokenise
from derta_jax.errors import UserError
from derta_jax.interop.tokenizer import load_tokenizer, refusal_token_id, stop_token_ids
from tests.conftest import write_tokenizer

TEXT = "Sorry, I can't.\nCafé naïve über 東京 😀 🧑🏽‍🚀 ෴\n\n  two  spaces\tand a tab, é"
LLAMA3_SPECIAL = {"<|begin_of_text|>": 128000, "<|end_of_text|>": 128001, "<|eot_id|>": 128009}
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.fixture(scope="module")
def llama3(shared_data, tmp_path_factory):
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter

    names = {number: name for name, number in LLAMA3_SPECIAL.items()}
    special = [names.get(number, f"<|reserved_{number}|>") for number in range(128000, 128010)]
    converter = TikTokenConverter(
        str(shared_data / "tokenizers" / "llama3.tiktoken"), LLAMA3_PATTERN, extra_special_tokens=special
    )
    directory = tmp_path_factory.mktemp("llama3")
    PreTrainedTokenizerFast(
        tokenizer_object=converter.converted(), bos_token="<|begin_of_text|>", eos_token="<|end_of_text|>"
    ).save_pretrained(directory)
    return load_tokenizer(directory)


def sentencepiece(shared_data, directory, version):
    shutil.copyfile(shared_data / "tokenizers" / f"mistral-{version}.model", directory / "tokenizer.model")
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "legacy": False,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return load_tokenizer(directory)


@pytest.fixture(scope="module")
def mistral_v1(shared_data, tmp_path_factory):
    return sentencepiece(shared_data, tmp_path_factory.mktemp("v1"), "v1")


@pytest.fixture(scope="module")
def mistral_v3(shared_data, tmp_path_factory):
    return sentencepiece(shared_data, tmp_path_factory.mktemp("v3"), "v3")


@pytest.fixture(params=["llama3", "mistral_v1", "mistral_v3"])
def tokenizer(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def tiny(tmp_path):
    write_tokenizer(tmp_path)
    return load_tokenizer(tmp_path)


def edit_config(directory, **changes):
    file = directory / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    ("name", "glued", "spaced"),
    [("llama3", 19701, 33386), ("mistral_v1", 23166, 19385), ("mistral_v3", 23934, 20153)],
)
def test_the_refusal_token_is_the_papers_and_a_leading_space_asks_for_the_other(name, glued, spaced, request):
    tokenizer = request.getfixturevalue(name)
    assert refusal_token_id(tokenizer, "Sorry") == glued
    assert refusal_token_id(tokenizer, " Sorry") == spaced


@pytest.mark.parametrize(
    ("name", "bos", "eos"), [("llama3", 128000, 128001), ("mistral_v1", 1, 2), ("mistral_v3", 1, 2)]
)
def test_bos_and_eos_are_those_of_the_vocabulary(name, bos, eos, request):
    tokenizer = request.getfixturevalue(name)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (bos, eos)


def test_a_prompt_starts_with_one_bos(tokenizer):
    assert tokenizer.prompt_ids("Hello") == [tokenizer.bos_id, *tokenizer.encode("Hello")]
    brought = tokenizer.prompt_ids(tokenizer.hf.bos_token + "Hello")
    assert brought.count(tokenizer.bos_id) == 1


def test_decoding_gives_the_text_back_without_special_tokens(tokenizer):
    assert tokenizer.decode([tokenizer.bos_id, *tokenizer.encode(TEXT), tokenizer.eos_id]) == TEXT


def test_token_texts_joined_read_like_the_text(tokenizer):
    texts = tokenizer.token_texts(tokenizer.encode(TEXT))
    assert "".join(texts).removeprefix(" ") == TEXT
    assert len(texts) == len(tokenizer.encode(TEXT))


def test_special_tokens_read_as_they_are_written(tokenizer):
    assert tokenizer.token_texts([tokenizer.bos_id]) == [tokenizer.hf.bos_token]


def test_ids_beyond_the_vocabulary_read_as_nothing(tiny):
    assert tiny.token_texts([*tiny.encode("kite"), 100_000])[-1] == ""


def test_tiny_token_texts_joined_read_like_the_text(tiny):
    assert "".join(tiny.token_texts(tiny.encode(TEXT))) == TEXT


def test_offsets_point_at_the_characters_of_each_token(tokenizer):
    (ids,), (offsets,) = tokenizer.encode_with_offsets([TEXT])
    assert ids == tokenizer.encode(TEXT)
    starts, ends = np.array(offsets).T
    assert (ends >= starts).all()
    assert (np.diff(ends) >= 0).all()
    assert (starts[0], ends[-1]) == (0, len(TEXT))


def test_regions_fit_the_text_that_they_came_from(tokenizer):
    row = Row(
        id="row",
        recipe="derta",
        prompt="How do I make a kite?",
        harmful_prefix="First, take\npaper",
        response="Sorry, Café 東京.",
        stream="mle",
    )
    template = Template("Question: {prompt} Answer:", tokenizer)
    (tokens,) = tokenise([row], tokenizer, template, 256)
    texts = {
        region: tokenizer.decode(tokens.token_ids[tokens.regions == region].tolist()).strip()
        for region in (Region.PROMPT, Region.HARMFUL_PREFIX, Region.RESPONSE)
    }
    assert texts == {
        Region.PROMPT: "Question: How do I make a kite? Answer:",
        Region.HARMFUL_PREFIX: "First, take\npaper",
        Region.RESPONSE: "Sorry, Café 東京.",
    }
    assert tokens.token_ids[0] == tokenizer.bos_id
    assert tokens.token_ids[-1] == tokenizer.eos_id
    assert tokens.regions[-1] == Region.EOS


def test_a_directory_without_tokenizer_files_is_said_so(tmp_path):
    with pytest.raises(UserError, match=r"no tokenizer files in .* \(looked for tokenizer\.json, tokenizer\.model"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", '{"version": "1.0", "model": {"type": "nonsense"}}'])
def test_a_broken_tokenizer_file_is_said_so(tmp_path, text):
    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(UserError, match=f"the tokenizer in {tmp_path} cannot be read"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_without_eos_is_refused(tmp_path):
    write_tokenizer(tmp_path)
    edit_config(tmp_path, eos_token=None)
    with pytest.raises(UserError, match="has no eos token, so answers could not end: set eos_token"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_without_bos_adds_none(tmp_path):
    write_tokenizer(tmp_path)
    edit_config(tmp_path, bos_token=None)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.bos_id is None
    assert tokenizer.prompt_ids("Hello") == tokenizer.encode("Hello")


def test_a_refusal_word_of_several_tokens_is_refused_with_its_pieces(tiny):
    with pytest.raises(UserError) as error:
        refusal_token_id(tiny, "Unfortunately")
    assert "'Unfortunately' is not a single token" in str(error.value)
    assert "(it becomes ['U', " in str(error.value)
    assert "set objective.refusal_token" in str(error.value)


def growing(tokenizer, token_ids):
    """What is settled after each token, and the whole at last."""
    return [tokenizer.decode_settled(token_ids[:count]) for count in range(len(token_ids) + 1)], tokenizer.decode(
        token_ids
    )


def test_settled_text_only_grows_and_is_the_beginning_of_the_whole(tokenizer):
    random = np.random.default_rng(0)
    answers = [tokenizer.encode(TEXT), *random.integers(0, len(tokenizer.hf), (200, 12)).tolist()]
    low = random.integers(0, 300, (200, 12)).tolist()  # many of them bytes
    for token_ids in answers + low:
        parts, whole = growing(tokenizer, token_ids)
        for shorter, longer in itertools.pairwise([*parts, whole]):
            assert longer.startswith(shorter), token_ids


def test_settled_text_keeps_up_with_the_tokens(tokenizer):
    parts, whole = growing(tokenizer, tokenizer.encode("First do one thing, then another."))
    assert whole in (parts[-1], " " + parts[-1])
    assert len(set(parts)) == len(parts)


def test_a_character_is_settled_when_its_last_byte_is_there(tiny):
    token_ids = tiny.encode("a😀b")
    parts, _ = growing(tiny, token_ids)
    assert parts == ["", "a", *["a"] * (len(token_ids) - 3), "a😀", "a😀b"]


def test_where_spaces_are_cleaned_afterwards_the_last_characters_are_not_settled(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<eos>", *["we", "do", "n't", ".", "'", "s", "m", "know", "n", "t", ",", "ve"]]
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<eos>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<eos>", clean_up_tokenization_spaces=True
    ).save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.decode(tokenizer.encode("we do n't know .")) == "we don't know."
    for token_ids in np.random.default_rng(0).integers(1, len(words), (500, 12)).tolist():
        parts, whole = growing(tokenizer, token_ids)
        assert all(whole.startswith(part) for part in parts)
        assert parts[-1]


def test_without_a_chat_template_chat_says_which_key_to_set(tiny):
    with pytest.raises(UserError, match=r"has no chat template: set data\.template"):
        tiny.chat("Hello")


def test_chat_ends_where_the_answer_starts(tmp_path):
    template = "{% for m in messages %}<{{ m.role }}> {{ m.content }} {% endfor %}"
    write_tokenizer(tmp_path, template + "{% if add_generation_prompt %}<assistant>{% endif %}")
    assert load_tokenizer(tmp_path).chat("Hello") == "<user> Hello <assistant>"


TURNS = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Well"},
]


def test_turns_end_where_the_next_answer_starts_or_where_the_last_one_goes_on(tmp_path):
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}"
    write_tokenizer(tmp_path, template + "{% if add_generation_prompt %}<assistant>{% endif %}")
    tokenizer = load_tokenizer(tmp_path)
    beginning = "<system>Be kind.</system><user>Hello</user><assistant>Well"
    assert tokenizer.chat_turns(TURNS) == beginning + "</assistant><assistant>"
    assert tokenizer.chat_turns(TURNS, go_on=True) == beginning


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('no ' + messages[0].content) }}", "does not take these .*: no Be kind"),
        ("{{ messages[0].content }}", "does not show the last message as it is"),
    ],
)
def test_turns_that_the_template_refuses(tmp_path, template, message):
    write_tokenizer(tmp_path, template)
    with pytest.raises(UserError, match=message):
        load_tokenizer(tmp_path).chat_turns(TURNS, go_on=True)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (None, (2,)),
        ({}, (2,)),
        ({"eos_token_id": None}, (2,)),
        ({"eos_token_id": 2}, (2,)),
        ({"eos_token_id": 7}, (2, 7)),
        ({"eos_token_id": [9, 7, 2]}, (2, 7, 9)),
    ],
)
def test_an_answer_stops_at_eos_and_at_those_of_the_generation_config(tiny, config, expected):
    if config is not None:
        (tiny.directory / "generation_config.json").write_text(json.dumps(config))
    assert stop_token_ids(tiny) == expected
