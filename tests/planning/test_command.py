"""`derta plan` as its users meet it: tables or JSON, a second time at once, and mistakes explained."""

import dataclasses
import io
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from derta_jax.cli import main
from derta_jax.config import dump_config
from derta_jax.planning import plan as plan_module
from derta_jax.planning.command import all_slices, show_plans
from derta_jax.planning.plan import Question, describe
from derta_jax.planning.published import PUBLISHED
from derta_jax.planning.slices import find_slice
from tests.planning.conftest import SMALL, made_up, plan_config, small_model

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture(autouse=True)
def apart(monkeypatch, tmp_path):
    """Plans are kept in a directory of the test's own; the command's choice of platform ends with the test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture
def config(tmp_path) -> str:
    """Of the published Llama 3 8B."""
    file = tmp_path / "small.yaml"
    file.write_text(dump_config(plan_config()), encoding="utf-8")
    return str(file)


@pytest.fixture
def compiler(monkeypatch):
    """In place of the compiler: the slices it was asked for; `v5e-4` is too small for everything but LoRA."""
    asked: list[str] = []

    def compile_for(config, model, place, memory_only=False, tell=None):
        asked.append(place.name)
        fits = place.name != "v5e-4" or config.lora is not None
        return made_up(fits, cycles=3e9 * (2 if config.train.remat == "full" else 1), peak_gib=12.5 if fits else 40.0)

    monkeypatch.setattr(plan_module, "compile_for", compile_for)
    return asked


@pytest.fixture
def no_compiler(monkeypatch):
    """From when it is called, planning anew is an error."""

    def forbid() -> None:
        monkeypatch.setitem(sys.modules, "derta_jax.planning.plan", None)

    return forbid


def printed(capsys, *words: str) -> str:
    capsys.readouterr()
    assert main(["plan", *words]) == 0
    out, err = capsys.readouterr()
    assert not err
    return out


def refused(capsys, *words: str) -> str:
    capsys.readouterr()
    assert main(["plan", *words]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("derta plan: ")
    assert "Traceback" not in err
    return err


def test_json_is_one_object_for_each_slice_in_order(config, compiler, capsys):
    plans = json.loads(printed(capsys, config, "--slice", "v5p-8,v5e-4,2xv5e-16", "--json"))
    assert [plan["slice"] for plan in plans] == ["v5p-8", "v5e-4", "2xv5e-16"]
    assert [plan["fits"] for plan in plans] == [True, False, True]
    assert [plan["config"] for plan in plans] == ["small"] * 3
    assert plans[0]["estimated_step_seconds"] == pytest.approx(6e9 / 1.75e9, rel=1e-3)
    assert plans[1]["suggestion"].startswith("--slice v5e-8")


def test_overrides_are_planned_for_and_named(config, compiler, capsys):
    (plan,) = json.loads(printed(capsys, config, "train.accumulation=2", "--slice", "v5p-8", "--json", "lora.rank=8"))
    assert (plan["config"], plan["accumulation"]) == ("small train.accumulation=2 lora.rank=8", 2)


def test_the_second_time_nothing_is_compiled_or_loaded(config, compiler, capsys, no_compiler):
    first = printed(capsys, config, "--slice", "v5p-8,v5e-4", "--json")
    no_compiler()
    assert printed(capsys, config, "--slice", "v5p-8,v5e-4", "--json") == first
    assert json.loads(printed(capsys, config, "--slice", "v5e-4", "--json"))[0]["slice"] == "v5e-4"
    assert "v5p-8" in printed(capsys, config, "--slice", "v5p-8")


def test_a_kept_plan_goes_by_the_name_of_who_asks(config, compiler, capsys, no_compiler, tmp_path):
    printed(capsys, config, "--slice", "v5p-8", "--json")
    no_compiler()
    other = tmp_path / "other.yaml"
    other.write_text(Path(config).read_text())
    asked = printed(capsys, str(other), "train.output=elsewhere", "--slice", "v5p-8", "--json")
    assert json.loads(asked)[0]["config"] == "other train.output=elsewhere"


@pytest.mark.parametrize("words", [["train.accumulation=2"], ["--price", "0.5"], ["--search"]], ids=str)
def test_another_question_is_not_answered_from_what_was_kept(words, config, compiler, capsys):
    printed(capsys, config, "--slice", "v5p-8", "--json")
    before = len(compiler)
    printed(capsys, config, "--slice", "v5p-8", "--json", *words)
    assert len(compiler) > before


def test_the_price_given_is_the_price_reckoned_with(config, compiler, capsys):
    listed, given = (
        json.loads(printed(capsys, config, "--slice", "v5p-8", "--json", *words))[0]
        for words in ([], ["--price", "2.1"])
    )
    assert given["dollars"] == pytest.approx(listed["dollars"] / 2)
    assert given["estimated_step_seconds"] == listed["estimated_step_seconds"]


def rows(text: str, name: str) -> list[list[str]]:
    """What the tables say of a slice, word by word."""
    return [line.split() for line in text.splitlines() if line.split()[:1] == [name] and "does not fit" not in line]


def test_the_tables_have_slices_memory_and_money_and_say_what_would_fit(config, compiler, capsys):
    text = printed(capsys, config, "train.steps=100000", "train.accumulation=2", "--slice", "v5p-8,v5e-4")
    memory, speed = text.split("a step, and the run")
    assert "HBM of a chip, GiB" in memory
    headings = ["slice", "how", "peak", "of", "params", "optim.", "grads", "activ.", "rest"]
    assert headings in [line.split() for line in memory.splitlines()]
    how = ["fsdp", "4,", "full,", "÷2"]
    assert rows(memory, "v5p-8") == [["v5p-8", *how, "12.50", "95.74", "1.0", "2.0", "3.0", "2.5", "4.0"]]
    assert rows(memory, "v5e-4") == [["v5e-4", *how, "40.00", "15.75", "3.2", "6.4", "9.6", "8.0", "12.8"]]
    headings = ["slice", "how", "s", "tokens/s/chip", "MFU", "moved,", "GB", "hours", "$"]
    assert headings in [line.split() for line in speed.splitlines()]
    # 4 rows of 128 tokens in 6e9 cycles at 1.75 GHz; 95.24 hours of 4 chips at $4.20
    assert rows(speed, "v5p-8") == [["v5p-8", *how, "3.43", "37", "0%", "9", "95.2", "1,600"]]
    assert rows(speed, "v5e-4") == []
    assert "v5e-4 does not fit; this does: --slice v5e-8 (12.5 of 15.75 GiB)\n" in text
    assert "v5p-8 does not fit" not in text
    assert "1.0 to 1.6 times" in text


def test_a_run_of_epochs_has_neither_hours_nor_a_price(config, compiler, capsys):
    text = printed(capsys, config, "train.steps=null", "train.epochs=2", "--slice", "v5p-8")
    assert rows(text, "v5p-8")[1][-3:] == ["9", "–", "–"]


def test_the_tables_of_a_narrow_terminal_still_have_every_figure(config, compiler, capsys, monkeypatch):
    words = (config, "train.steps=100000", "--slice", "v5p-8,v5e-4")
    wide = printed(capsys, *words)
    monkeypatch.setenv("COLUMNS", "80")
    narrow = printed(capsys, *words)
    assert set(narrow.split()) >= set(wide.split()) - {"─" * n for n in range(200)}
    hint = "v5e-4 does not fit; this does: "
    assert all(len(line) <= 80 for line in narrow.splitlines() if not line.startswith(hint))


def shown(plans: list[dict[str, Any]]) -> str:
    console = Console(width=80, file=io.StringIO())
    show_plans(plans, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize(
    ("name", "mesh", "train", "how"),
    [
        ("v5e-16", {"fsdp": 16}, {"remat": "attention"}, "fsdp 16, attention"),
        ("v5p-128", {"fsdp": 32, "tensor": 2}, {"remat": "offload"}, "fsdp 32 × tensor 2, offload"),
        (
            "2xv5e-256",
            {"data": 2, "fsdp": 128, "tensor": 2},
            {"remat": "attention", "accumulation": 16},
            "data 2 × fsdp 128 × tensor 2, attention, ÷16",
        ),
    ],
)
def test_large_slices_and_figures_are_whole_in_eighty_columns(name, mesh, train, how):
    section = {"steps": 20_000, "batch_size": 8192, "sequence_length": 8192} | train
    asked = Question("large", plan_config(train=section), small_model(), find_slice(name))
    axes = {"data": 1, "fsdp": 1, "expert": 1, "tensor": 1} | mesh
    fits, too_large = (
        describe(asked, dataclasses.replace(made_up(fits, cycles=99e9, peak_gib=size), mesh=axes))
        for fits, size in ((True, 15.5), (False, 1234.0))
    )
    hint = "train.remat=full train.attention=splash train.accumulation=128 (15.7 of 15.75 GiB)"
    text = shown([fits, too_large | {"suggestion": hint}])
    words = text.split()
    assert "…" not in text
    assert words.count(name) == 4  # a row in memory of both, one in speed, and the hint
    assert {*how.split(), "15.50", "1234.00", "394.9", f"{fits['hbm_gib']}"} <= set(words)
    for key, form in (("estimated_step_seconds", ".2f"), ("tokens_per_second_per_chip", ",.0f"), ("mfu", ".0%")):
        assert format(fits[key], form) in words
    assert f"{fits['hours']:.1f}" in words
    assert f"{fits['dollars']:,.0f}" in words
    assert f"{name} does not fit; this does: {hint}\n" in text
    assert all(len(line) <= 80 for line in text.splitlines() if hint not in line)


def test_what_the_host_keeps_has_a_column_where_it_keeps_anything():
    asked = Question("small", plan_config(), small_model(), find_slice("v5e-4"))
    plain, offloaded, too_large = (
        describe(asked, dataclasses.replace(made_up(fits), host_bytes=host * 2**30))
        for fits, host in ((True, 0), (True, 2.5), (False, 0))
    )
    ends = [
        [words[-1] for line in shown(plans).splitlines() if (words := line.split())[:1] in (["slice"], ["v5e-4"])]
        for plans in ([plain, too_large], [plain, offloaded, too_large])
    ]
    assert ends[0][0] == "rest"
    assert ends[1][:4] == ["host", "0.0", "2.5", "?"]


def test_where_nothing_fits_the_slice_is_named(config, monkeypatch, capsys):
    monkeypatch.setattr(plan_module, "compile_for", lambda *args, **more: made_up(fits=False, peak_gib=99.0))
    text = printed(capsys, config, "--slice", "v5e-4,v5p-8")
    for name in ("v5e-4", "v5p-8"):
        assert f"{name} does not fit; nor does anything that was tried\n" in text
        assert [row[4] for row in rows(text, name)] == ["99.00"]
    assert "tokens/s/chip" not in text


def test_a_program_of_unknown_size_is_still_json(config, monkeypatch, capsys):
    monkeypatch.setattr(plan_module, "compile_for", lambda *args, **more: made_up(fits=False, peak_gib=float("inf")))
    (plan,) = json.loads(printed(capsys, config, "--slice", "v5e-4", "--json"))
    assert not plan["fits"]
    assert plan["peak_hbm_gib"] is None
    # the second time it is read from what was kept
    assert json.loads(printed(capsys, config, "--slice", "v5e-4", "--json")) == [plan]
    assert rows(printed(capsys, config, "--slice", "v5e-4"), "v5e-4")[0][4:] == ["?", "15.75", *"?????"]


def test_a_search_prints_the_fastest_first(config, compiler, capsys):
    plans = json.loads(printed(capsys, config, "--slice", "v5p-8", "--search", "--json"))
    seconds = [plan["estimated_step_seconds"] for plan in plans]
    assert seconds == sorted(seconds)
    assert plans[0]["remat"] != "full"
    assert len(plans) == len(compiler) > 3


def test_a_search_in_which_nothing_fits_says_so(config, compiler, capsys):
    assert "nothing that was tried fits" in printed(capsys, config, "--slice", "v5e-4", "--search")


def test_all_slices_are_those_on_which_every_chip_gets_a_row(config, compiler, capsys):
    plans = json.loads(printed(capsys, config, "--all-slices", "--json"))
    assert [plan["slice"] for plan in plans] == ["v4-8", "v5e-1", "v5e-4", "v5p-8", "v6e-1", "v6e-4"]
    with_tensor = plan_config(train={"batch_size": 16, "accumulation": 2}, mesh={"tensor": 2})
    assert max(place.chips for place in all_slices(with_tensor)) == 16
    assert max(place.chips for place in all_slices(plan_config(train={"batch_size": 4096}))) == 256


def test_without_a_slice_the_user_is_told_how_to_name_one(config, capsys):
    for words in ([], ["--slice", "v5e-16", "--all-slices"]):
        assert "say where: --slice v5e-16 (or more of them, with commas), or --all-slices" in refused(
            capsys, config, *words
        )


def test_a_slice_that_is_none_names_the_nearest(config, capsys):
    message = refused(capsys, config, "--slice", "v5e-4,v5p128")
    assert "no slice 'v5p128'; did you mean 'v5p-128'?" in message


@pytest.mark.parametrize("names", [",", " "])
def test_a_list_of_no_slices_is_a_mistake_too(names, config, capsys):
    assert f"no slice in {names!r}: name one, as v5e-16" in refused(capsys, config, "--slice", names)


def test_a_model_that_is_not_there_is_a_users_mistake(config, capsys, tmp_path):
    assert str(tmp_path / "nothing") in refused(
        capsys, config, f"model.path={tmp_path / 'nothing'}", "--slice", "v5e-4"
    )


def test_a_directory_without_a_config_is_a_users_mistake(config, capsys, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "config.json" in refused(capsys, config, f"model.path={tmp_path / 'empty'}", "--slice", "v5e-4")


def test_a_config_that_the_slice_cannot_run_is_a_users_mistake(config, libtpu, capsys):
    message = refused(capsys, config, "train.accumulation=4", "--slice", "v5e-4")
    assert "train.batch_size = 4 rows do not split over 4 devices" in message


def test_a_directory_with_nothing_but_a_config_is_planned_for(config, libtpu, capsys, tmp_path, no_compiler):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(SMALL))
    words = (config, f"model.path={tmp_path / 'model'}", "--slice", "v5e-4", "--json")
    first = printed(capsys, *words)
    (plan,) = json.loads(first)
    assert plan["fits"]
    assert plan["chips"] == 4
    assert plan["estimated_cycles"] > 1000
    no_compiler()
    assert printed(capsys, *words) == first


def test_devices_are_taken_from_nowhere_but_libtpu(config, compiler, capsys, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "tpu")
    printed(capsys, config, "--slice", "v5p-8", "--json")
    assert os.environ["JAX_PLATFORMS"] == "cpu"


def test_every_config_of_the_project_is_of_a_model_that_can_be_planned_for(compiler, capsys):
    own = {"tiny", "bench_cpu", "bench_gpu"}  # the user names the model, or there is none
    files = [file for file in sorted(CONFIGS.glob("*.yaml")) if file.stem not in own]
    assert files
    for file in files:
        (plan,) = json.loads(printed(capsys, str(file), "--slice", "v5p-8", "--json"))
        assert plan["config"] == file.stem


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_published_models_need_no_download(name, config, compiler, capsys):
    (plan,) = json.loads(printed(capsys, config, f"model.path={name}", "--slice", "v5p-8", "--json"))
    assert plan["fits"]
