"""A kept answer is found again by the same question, and by no other."""

import importlib.metadata

import pytest

from derta_jax.planning import plan_cache
from derta_jax.planning.published import architecture
from tests.planning.conftest import plan_config, small_model

ASKED = {"slice": "v5e-16", "search": False, "price": None}
LORA = {"rank": 8}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "derta_jax" / "plans"


def key_of(config, model=None, **asked) -> str:
    return plan_cache.key(config, model or small_model(), ASKED | asked)


def test_the_same_question_has_the_same_key():
    assert key_of(plan_config()) == key_of(plan_config())


@pytest.mark.parametrize(
    "sections",
    [
        {"train": {"batch_size": 8}},
        {"train": {"sequence_length": 256}},
        {"train": {"accumulation": 2}},
        {"train": {"remat": "none"}},
        {"train": {"attention": "splash"}},
        {"train": {"dtype": "float32"}},
        {"train": {"optimizer_dtype": "bfloat16"}},
        {"train": {"clip": None}},
        {"train": {"steps": 11}},
        {"mesh": {"tensor": 2}},
        {"mesh": {"data": 2}},
        {"objective": {"loss_chunk": 64}},
        {"objective": {"paper": True}, "data": {"packing": "none"}},
        {"lora": LORA},
    ],
    ids=str,
)
def test_whatever_reaches_the_program_changes_the_key(sections):
    assert key_of(plan_config(**sections)) != key_of(plan_config())


@pytest.mark.parametrize("change", [{"rank": 16}, {"quantise": "nf4"}, {"targets": ("q_proj",)}, {"dropout": 0.0}])
def test_so_does_whatever_adapters_are_made_of(change):
    assert key_of(plan_config(lora=LORA | change)) != key_of(plan_config(lora=LORA))


@pytest.mark.parametrize(
    "sections",
    [
        {"train": {"output": "elsewhere"}},
        {"train": {"seed": 7}},
        {"train": {"skip_limit": 2}},
        {"train": {"compilation_cache": None}},
        {"data": {"path": "other.jsonl"}},
        {"data": {"template": "chat"}},
        {"checkpoint": {"every_steps": 5}},
        {"watch": {"wandb": "project"}},
        {"held_out": {"path": "held_out.jsonl"}},
        {"model": {"path": "another place of the same architecture"}},
    ],
    ids=str,
)
def test_what_does_not_reach_the_program_leaves_the_key(sections):
    assert key_of(plan_config(**sections)) == key_of(plan_config())


@pytest.mark.parametrize(
    "asked", [{"slice": "v5p-8"}, {"slice": "2xv5e-16"}, {"search": True}, {"price": 0.5}], ids=str
)
def test_another_slice_search_or_price_is_another_question(asked):
    assert key_of(plan_config(), **asked) != key_of(plan_config())


STRETCHED = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize("change", [{"num_hidden_layers": 3}, {"rope_scaling": STRETCHED}], ids=["layers", "rope"])
def test_another_architecture_has_another_key(change):
    assert key_of(plan_config(), small_model(**change)) != key_of(plan_config())


def test_one_architecture_under_two_names_has_one_key():
    base, instruct, larger = (
        key_of(plan_config(), architecture(f"meta-llama/Meta-Llama-3-{name}")) for name in ("8B", "8B-Instruct", "70B")
    )
    assert base == instruct != larger


def test_another_compiler_has_another_key(monkeypatch):
    before = key_of(plan_config())
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.0.1")
    assert key_of(plan_config()) != before


def test_an_answer_comes_back_as_it_was_kept(cache):
    answer = [{"slice": "v5e-16", "fits": True, "peak_hbm_gib": 12.25, "suggestion": None, "mesh": {"fsdp": 16}}]
    plan_cache.write("abc", answer)
    assert plan_cache.read("abc") == answer
    assert [file.name for file in cache.iterdir()] == ["abc.json"]


def test_a_later_answer_replaces_the_earlier_one():
    plan_cache.write("abc", [1])
    plan_cache.write("abc", [2])
    assert plan_cache.read("abc") == [2]


def test_what_was_never_asked_has_no_answer():
    assert plan_cache.read("abc") is None


@pytest.mark.parametrize("damage", [b"", b'[{"slice": "v5e', b"\xff\xfe\x00"], ids=["empty", "cut off", "no text"])
def test_a_damaged_file_is_no_answer_and_is_written_anew(cache, damage):
    plan_cache.write("abc", [1])
    (cache / "abc.json").write_bytes(damage)
    assert plan_cache.read("abc") is None
    plan_cache.write("abc", [1])
    assert plan_cache.read("abc") == [1]


def test_where_there_is_no_place_nothing_is_kept_and_nothing_is_said(tmp_path, monkeypatch, capfd):
    (tmp_path / "file").write_text("where a directory should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    plan_cache.write("abc", [1])
    assert plan_cache.read("abc") is None
    assert capfd.readouterr() == ("", "")


def test_without_xdg_cache_home_plans_are_kept_under_the_home_directory(tmp_path, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert plan_cache.directory() == tmp_path / ".cache" / "derta_jax" / "plans"
