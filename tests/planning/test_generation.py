"""What answering takes on a slice, by programs compiled for it."""

import json

import pytest

from derta_jax.cli import main
from derta_jax.config import dump_config
from derta_jax.errors import UserError
from derta_jax.planning import plan_cache
from derta_jax.planning.generation import plan_generation
from derta_jax.planning.load import Load, parse_load
from derta_jax.planning.slices import find_slice
from tests.planning.conftest import plan_config, small_model

GIB = 2**30


def test_a_load_is_rows_prompt_tokens_and_new_tokens():
    assert parse_load("32x512x256") == Load(32, 512, 256)


@pytest.mark.parametrize("text", ["32", "32x512", "0x1x1", "ax1x1", "1x1x1x1"])
def test_another_load_is_refused(text):
    with pytest.raises(UserError, match="as 32x512x256"):
        parse_load(text)


@pytest.mark.usefixtures("libtpu")
def test_memory_holds_weights_and_cache_of_a_chip():
    model = small_model(num_attention_heads=4, num_key_value_heads=4, num_hidden_layers=2)
    plan = plan_generation("small", model, find_slice("v5e-4"), Load(8, 100, 64))
    assert plan["fits"]
    assert plan["mesh"] == {"data": 1, "fsdp": 1, "expert": 1, "tensor": 4}
    # two layers, keys and values, 8 rows, one head a chip, columns of a prompt's power of two and the answer, bfloat16
    assert plan["breakdown_gib"]["cache"] * GIB == 2 * 2 * 8 * 1 * (128 + 64) * 32 * 2
    assert sum(plan["breakdown_gib"].values()) < plan["peak_hbm_gib"] < 0.1
    step, prefill = plan["estimated_step_seconds"], plan["estimated_prefill_seconds"]
    assert 0 < plan["hbm_seconds"] <= step < prefill
    assert plan["tokens_per_second"] == pytest.approx(8 * 64 / (prefill + 64 * step))
    assert plan["tokens_per_second_per_chip"] == plan["tokens_per_second"] / 4


@pytest.mark.usefixtures("libtpu")
def test_what_is_too_large_does_not_fit():
    plan = plan_generation("small", small_model(), find_slice("v5e-1"), Load(64, 100_000, 10_000), memory_only=True)
    assert not plan["fits"]
    assert plan["tokens_per_second"] is None


def test_rows_that_do_not_split_over_the_chips_are_refused():
    pytest.importorskip("libtpu")
    with pytest.raises(UserError, match="3 rows do not split over 4 devices"):
        plan_generation("small", small_model(), find_slice("v5e-4"), Load(3, 10, 10))


def test_the_command_prints_what_is_kept_of_an_earlier_plan(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("COLUMNS", "200")
    kept = {
        "config": "other",
        "slice": "v5e-4",
        "chips": 4,
        "mesh": {"data": 1, "fsdp": 1, "expert": 1, "tensor": 4},
        "rows": 32,
        "prompt_tokens": 512,
        "new_tokens": 256,
        "fits": True,
        "hbm_gib": 15.75,
        "peak_hbm_gib": 5.615,
        "breakdown_gib": {"parameters": 3.74, "cache": 0.75},
        "estimated_step_seconds": 0.0125,
        "estimated_prefill_seconds": 0.59,
        "tokens_per_second": 2160.0,
        "tokens_per_second_per_chip": 540.0,
        "dollars_per_million_tokens": 0.62,
        "compile_seconds": 30.0,
    }
    monkeypatch.setattr(plan_cache, "read", lambda digest: kept)
    config = tmp_path / "small.yaml"
    config.write_text(dump_config(plan_config()), encoding="utf-8")
    assert main(["plan", str(config), "--slice", "v5e-4", "--generate", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [kept | {"config": "small"}]
    assert main(["plan", str(config), "--slice", "v5e-4", "--generate", "32x512x256"]) == 0
    printed = capsys.readouterr().out
    assert "small: 32 answers at a time, 512 + 256 tokens" in printed
    assert all(figure in printed for figure in ("tensor 4", "5.62", "12.5", "2,160", "0.62"))
