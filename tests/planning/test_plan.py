"""Plans of small models for chips that are not here: real programs of XLA:TPU, and the search on made-up ones."""

import dataclasses
import json
import math
import re
from pathlib import Path

import pytest
import yaml

from derta_jax.config import Lora, RunConfig, load_config
from derta_jax.errors import UserError
from derta_jax.models.config import ModelConfig
from derta_jax.planning import plan as plan_module
from derta_jax.planning.compiled import GIB, Compiled, compile_for
from derta_jax.planning.plan import Question, describe, difference, export_gb, nearest_fit, plan, search
from derta_jax.planning.published import LLAMA_3_8B
from derta_jax.planning.slices import Slice, find_slice
from derta_jax.training.watching.flops import adapter_parameters, flops_per_token, mean_attended
from tests.planning.conftest import SHARES, made_up, plan_config, small_model

PROMISED = {
    "config",
    "slice",
    "chips",
    "mesh",
    "accumulation",
    "remat",
    "fits",
    "hbm_gib",
    "peak_hbm_gib",
    "host_gib",
    "breakdown_gib",
    "model_flops_per_token",
    "step_flops",
    "estimated_cycles",
    "collective_bytes",
    "estimated_step_seconds",
    "tokens_per_second_per_chip",
    "mfu",
    "hours",
    "dollars",
    "compile_seconds",
    "suggestion",
}
"""Fields that other programs read."""

TOO_LARGE = {"batch_size": 1024, "sequence_length": 256, "remat": "none"}
"""Of which a chip of v5e-4 would keep 60 GiB of activations."""


def question(name: str = "v5e-4", model=None, price=None, **sections) -> Question:
    return Question("small", plan_config(**sections), model or small_model(), find_slice(name), price)


def wide(**sections) -> Question:
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 8, "num_key_value_heads": 8}
    return question(model=small_model(**sizes, num_hidden_layers=8), **sections)


def applied(asked: Question, words: str, directory: Path) -> Question:
    """A question after a user has done what a suggestion says."""
    words = words.partition(" (")[0]
    if words.startswith("--slice "):
        return dataclasses.replace(asked, place=find_slice(words.removeprefix("--slice ")))
    file = directory / "config.yaml"
    file.write_text(yaml.safe_dump(asked.config.model_dump(mode="json")), encoding="utf-8")
    return dataclasses.replace(asked, config=load_config(file, words.split()))


@pytest.fixture
def compiler(monkeypatch):
    """In place of the compiler: `answer(config, place)`, and the questions that it was asked."""

    def install(answer) -> list[tuple[RunConfig, Slice, bool]]:
        asked: list[tuple[RunConfig, Slice, bool]] = []

        def compile_for(config, model, place, memory_only=False, tell=None) -> Compiled:
            asked.append((config, place, memory_only))
            return answer(config, place)

        monkeypatch.setattr(plan_module, "compile_for", compile_for)
        return asked

    return install


# --- what XLA:TPU makes of it -----------------------------------------------------------------------------------------


def test_a_plan_has_every_promised_field(libtpu):
    result = plan(question())
    assert result.keys() >= PROMISED
    assert result["fits"]
    assert (result["config"], result["slice"], result["chips"]) == ("small", "v5e-4", 4)
    assert result["mesh"] == {"data": 1, "fsdp": 4, "expert": 1, "tensor": 1}
    assert (result["accumulation"], result["remat"], result["suggestion"]) == (1, "full", None)
    assert 0 < result["peak_hbm_gib"] < result["hbm_gib"] == 15.75
    assert json.loads(json.dumps(result, allow_nan=False)) == result


def test_its_figures_agree_with_each_other(libtpu):
    result = plan(question())
    seconds, tokens = result["estimated_step_seconds"], 4 * 128
    assert result["estimated_cycles"] > 1000
    assert result["cycle_seconds"] == pytest.approx(result["estimated_cycles"] / 1.5e9)
    busy = result["cycle_seconds"] + result["kernel_seconds"] + result["exposed_seconds"]
    assert seconds == max(busy, result["collective_seconds"])
    assert result["tokens_per_second_per_chip"] == pytest.approx(tokens / 4 / seconds)
    assert result["model_flops_per_token"] == flops_per_token(small_model(), None, mean_attended(128))
    assert result["step_flops"] == pytest.approx(result["model_flops_per_token"] * tokens)
    assert result["mfu"] == pytest.approx(result["step_flops"] / 4 / 197e12 / seconds)
    assert result["hours"] == pytest.approx(10 * seconds / 3600)
    assert result["dollars"] == pytest.approx(result["hours"] * 4 * 1.20)


def test_parameters_optimizer_and_gradients_are_split_over_the_chips(libtpu):
    model = small_model(vocab_size=8192)
    parts = plan(question(model=model))["breakdown_gib"]
    # float32, over 4 chips; norms are on all of them
    weights = (2 * 8192 * 128 + 2 * 128 * (4 * 128 + 3 * 256)) * 4 / 4 / GIB
    assert parts["parameters"] == pytest.approx(weights, rel=0.01)
    assert parts["gradients"] == parts["parameters"]
    assert parts["optimizer"] == pytest.approx(2 * parts["parameters"], rel=1e-3)


def test_activations_are_what_the_layers_keep(libtpu):
    kept = {
        remat: plan(question(train={"remat": remat}))["breakdown_gib"]["activations"] for remat in ("full", "attention")
    }
    # of one row on each chip, 128 wide: the input of two layers in bfloat16; then q, k, v and the result as well
    assert kept["full"] == 2 * 128 * 128 * 2 / GIB
    assert kept["attention"] == 5 * kept["full"]


def test_what_the_host_keeps_is_not_on_the_chip(libtpu):
    # of a model this narrow the inputs of layers are most of what a step holds
    narrow = small_model(num_hidden_layers=64, num_attention_heads=1, num_key_value_heads=1)
    section = {"batch_size": 8, "sequence_length": 1024, "attention": "splash"}
    full, offload = (
        plan(question("v5e-1", model=narrow, train=section | {"remat": remat})) for remat in ("full", "offload")
    )
    kept = full["breakdown_gib"]["activations"]
    assert kept == 64 * 8 * 1024 * 128 * 2 / GIB
    assert (full["host_gib"], offload["host_gib"]) == (0, kept)
    assert offload["breakdown_gib"]["activations"] == 0
    assert offload["peak_hbm_gib"] == pytest.approx(full["peak_hbm_gib"] - kept, rel=0.1)
    assert (full["host_seconds"], offload["host_seconds"]) == (0, pytest.approx(2 * kept * GIB / 16e9, rel=0.01))


def test_two_slices_are_one_question(libtpu):
    result = plan(question("2xv5e-4", train={"batch_size": 8}, mesh={"data": 2}))
    assert (result["chips"], result["mesh"]["data"], result["mesh"]["fsdp"]) == (8, 2, 4)
    assert result["fits"]


@pytest.mark.slow
def test_what_does_not_fit_says_so_and_its_suggestion_fits(libtpu, tmp_path):
    asked = wide(train=TOO_LARGE)
    result = plan(asked)
    assert not result["fits"]
    assert result["peak_hbm_gib"] > result["hbm_gib"] == 15.75
    assert result["breakdown_gib"]["activations"] > 15.75
    assert sum(result["breakdown_gib"].values()) == pytest.approx(result["peak_hbm_gib"])
    said = re.fullmatch(r"(.+) \((.+) of 15\.75 GiB\)", result["suggestion"])
    assert said is not None
    words, gib = said.groups()
    assert words == "train.remat=full train.attention=splash"
    mended = applied(asked, words, tmp_path)
    compiled = compile_for(mended.config, mended.model, mended.place, memory_only=True)
    assert compiled.fits
    assert compiled.peak_bytes / GIB == pytest.approx(float(gib), abs=0.06)


@pytest.mark.slow
def test_the_search_is_sorted_and_its_first_is_no_slower_than_what_was_asked(libtpu):
    asked = question("v5e-1", train={"batch_size": 1, "remat": "none"})
    given = plan(asked)["estimated_step_seconds"]
    plans = search(asked)
    seconds = [result["estimated_step_seconds"] for result in plans]
    assert len(plans) >= 3
    assert seconds == sorted(seconds)
    assert seconds[0] <= given
    assert given in seconds
    assert all(result["fits"] and result.keys() >= PROMISED for result in plans)


# --- what the search asks ---------------------------------------------------------------------------------------------


def test_a_plan_that_fits_is_compiled_once(compiler):
    asked = compiler(lambda config, place: made_up())
    result = plan(question())
    assert [memory_only for _, _, memory_only in asked] == [False]
    assert result["kernels"] == {"tpu_custom_call/gmm": 3}
    assert result["peak_hbm_gib"] == 3


def test_a_given_price_takes_the_place_of_the_list_price():
    listed, given = (describe(question(price=price), made_up()) for price in (None, 0.6))
    assert given["dollars"] == pytest.approx(listed["dollars"] / 2)


def test_a_run_of_epochs_has_no_hours_without_its_data():
    result = describe(question(train={"steps": None, "epochs": 2}), made_up())
    assert result["estimated_step_seconds"] > 0
    assert result["hours"] is result["dollars"] is None


def test_one_that_does_not_fit_has_every_field_and_none_for_what_is_not_known():
    fitting, too_large = (describe(question(), made_up(fits)) for fits in (True, False))
    assert fitting.keys() == too_large.keys() >= PROMISED
    known = {name for name, value in too_large.items() if value is not None}
    assert {name for name, value in fitting.items() if value is None} == {"suggestion"}
    assert known == {
        *("config", "slice", "chips", "mesh", "accumulation", "remat"),
        *("fits", "hbm_gib", "peak_hbm_gib", "breakdown_gib", "compile_seconds", "export_gb"),
    }
    assert all(too_large[name] == fitting[name] for name in known - {"fits"})


def test_a_size_that_the_compiler_does_not_tell_is_none():
    compiled = made_up(fits=False)
    parts = compiled.breakdown | {"rest": math.inf}
    result = describe(question(), dataclasses.replace(compiled, peak_bytes=math.inf, breakdown=parts))
    assert result["peak_hbm_gib"] is None
    assert result["breakdown_gib"]["rest"] is None
    assert result["breakdown_gib"]["parameters"] == pytest.approx(3.0 * SHARES["parameters"])
    assert json.loads(json.dumps(result, allow_nan=False)) == result


def test_it_says_that_it_fits_before_its_time_is_known(libtpu):
    said: list[str] = []
    result = plan(wide(train={"sequence_length": 1024, "batch_size": 64}), said.append)
    assert said[0] == "small on v5e-4"
    found = re.fullmatch(r"small on v5e-4, which fits \((.+) of 15\.75 GiB\)", said[1])
    assert found is not None
    assert float(found[1]) == pytest.approx(result["peak_hbm_gib"], rel=0.1, abs=0.05)
    assert len(said) == 2


@pytest.mark.parametrize("fits", [True, False])
def test_it_says_what_it_compiles(fits, compiler):
    compiler(lambda config, place: made_up(fits or config.train.accumulation == 2))
    said: list[str] = []
    plan(question(), said.append)
    assert said[0] == "small on v5e-4"
    assert bool(said[1:]) != fits


@pytest.mark.parametrize(
    "sections",
    [
        {"train": {"sequence_length": 1024}},
        {"train": {"sequence_length": 128}},
        {"train": {"remat": "none"}},
        {"train": {"attention": "splash"}},
        {"train": {"attention": "splash", "remat": "attention", "accumulation": 2}},
        {"lora": {"rank": 8}},
        {"mesh": {"tensor": 2}},
    ],
    ids=str,
)
def test_a_suggestion_says_all_that_was_changed(sections, compiler, tmp_path):
    said: list[str] = []
    asked = compiler(lambda config, place: made_up(fits=False))
    start = question(**sections)
    assert nearest_fit(start, said.append) is None
    assert len(said) == len(asked) > 5
    for line, (config, place, memory_only) in zip(said, asked, strict=True):
        words = line.removeprefix("does ").removesuffix(" fit?")
        followed = applied(start, words, tmp_path)
        assert (words, followed.config, followed.place) == (words, config, place)
        assert memory_only


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train": {"remat": "full", "attention": "splash"}}, "train.remat=full train.attention=splash"),
        ({"train": {"remat": "none", "attention": "splash"}}, "train.attention=splash"),
        ({"train": {"accumulation": 4}, "mesh": {"tensor": 2}}, "train.accumulation=4 mesh.tensor=2"),
        ({"lora": {"rank": 96}}, "lora.rank=96"),
        ({}, ""),
    ],
    ids=str,
)
def test_of_two_questions_the_keys_that_differ_are_named_and_no_others(changes, words):
    asked = question(train={"remat": "none"})
    assert difference(asked, asked.but(**changes)) == words
    larger = dataclasses.replace(asked.but(**changes), place=find_slice("v5e-16"))
    assert difference(asked, larger) == f"--slice v5e-16 {words}".strip()


def test_what_costs_nothing_but_time_is_tried_before_a_larger_slice_and_other_weights(compiler):
    said: list[str] = []
    compiler(lambda config, place: made_up(fits=False))
    nearest_fit(question(train={"remat": "none", "sequence_length": 1024}), said.append)
    words = ("=splash", "=full", "=offload", "accumulation=2", "tensor=2", "--slice v5e-8", "lora.rank")
    *cheap, larger, adapters = [next(i for i, line in enumerate(said) if word in line) for word in words]
    assert cheap == sorted(cheap)
    assert max(cheap) < min(larger, adapters)
    slices = [line for line in said if "--slice" in line]
    assert "v5e-8" in slices[0]
    assert "v5e-256" in slices[-1]


def test_what_the_host_keeps_already_is_left_there(compiler):
    asked = compiler(lambda config, place: made_up(fits=False))
    nearest_fit(question(train={"remat": "offload"}), lambda text: None)
    assert {config.train.remat for config, _, _ in asked} == {"offload"}


def test_changes_that_do_not_go_together_are_passed_over(compiler):
    def answer(config, place):
        if place.chips == 4:
            raise UserError("rows do not split")
        return made_up(fits=place.chips == 16)

    compiler(answer)
    assert nearest_fit(question(), lambda text: None) == "--slice v5e-16 (3.0 of 15.75 GiB)"


def test_where_nothing_fits_nothing_is_suggested(compiler):
    compiler(lambda config, place: made_up(fits=False, peak_gib=100))
    result = plan(question())
    assert result["suggestion"] is None
    assert not result["fits"]
    assert result["peak_hbm_gib"] == 100


def test_a_search_tries_meshes_accumulation_and_remat_and_nothing_else(compiler):
    asked = compiler(lambda config, place: made_up())
    start = question(train={"batch_size": 16}, lora={"rank": 8})
    search(start)
    assert asked[0][0] == start.config
    tried = {(config.mesh.tensor, config.train.accumulation, config.train.remat) for config, _, _ in asked}
    assert len(tried) == len(asked) > 6
    assert {remat for _, _, remat in tried} == {"full", "attention", "dots", "offload"}
    assert {accumulation for _, accumulation, remat in tried if remat == "offload"} == {1}
    for config, place, memory_only in asked:
        same = {"accumulation": 1, "remat": "full"}
        train = config.train.model_copy(update=same)
        assert config.model_copy(update={"train": train, "mesh": start.config.mesh}) == start.config
        assert (place, memory_only) == (start.place, False)
        assert 16 % (place.chips // config.mesh.tensor * config.train.accumulation) == 0


def test_a_search_leaves_out_what_does_not_fit_or_go_together(compiler):
    def answer(config, place):
        if config.train.remat == "attention":
            raise UserError("no")
        return made_up(fits=config.train.remat == "full", cycles=3e9 / config.train.accumulation)

    compiler(answer)
    plans = search(question(train={"batch_size": 16}))
    assert {result["remat"] for result in plans} == {"full"}
    assert [result["accumulation"] for result in plans] == [4, 2, 1]
    assert all(result["suggestion"] is None for result in plans)


def test_a_search_says_which_of_its_candidates_it_compiles(compiler):
    compiler(lambda config, place: made_up())
    said: list[str] = []
    search(question(train={"batch_size": 8}), said.append)
    assert said[0] == f"small on v5e-4, 1 of {len(said)}: as it is"
    assert said[1] == f"small on v5e-4, 2 of {len(said)}: train.remat=attention"


def test_a_search_in_which_nothing_can_be_compiled_says_what_was_wrong_first(compiler):
    def answer(config, place):
        raise UserError(f"{config.train.remat} cannot be")

    asked = compiler(answer)
    with pytest.raises(UserError, match=r"^offload cannot be$"):
        search(question(train={"batch_size": 16, "remat": "offload"}))
    assert len(asked) > 3


def test_a_search_in_which_something_was_compiled_is_no_mistake(compiler):
    def answer(config, place):
        if config.train.remat != "full":
            raise UserError("cannot be")
        return made_up(fits=False)

    compiler(answer)
    assert search(question(train={"batch_size": 16, "remat": "offload"})) == []


def test_a_search_without_libtpu_says_so(monkeypatch):
    def absent(self):
        raise UserError("planning needs libtpu, on Linux: pip install 'derta-jax[tpu]'")

    monkeypatch.setattr(Slice, "devices", absent)
    with pytest.raises(UserError, match="needs libtpu"):
        search(question())


def test_an_export_is_the_published_number_of_parameters_in_two_bytes_each():
    model = ModelConfig.from_hf(LLAMA_3_8B)
    full, lora = (export_gb(plan_config(**sections), model) for sections in ({}, {"lora": {"rank": 96}}))
    assert full["model"] == pytest.approx(2 * 8_030_261_248 / 1e9)
    assert full["largest_tensor"] == pytest.approx(2 * 128_256 * 4096 / 1e9)
    assert full["adapter"] is None
    assert lora["adapter"] == pytest.approx(4 * adapter_parameters(model, Lora(rank=96)) / 1e9)
