import io
import json
import time
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from rich.console import Console

from derta_jax.config import RunConfig
from derta_jax.models.config import ModelConfig
from derta_jax.training.mesh import make_mesh
from derta_jax.training.watching import watch as module
from derta_jax.training.watching.flops import TrainFlops, train_flops
from derta_jax.training.watching.goodput import Ledger
from derta_jax.training.watching.metrics import Lap
from derta_jax.training.watching.watch import Meter, Watch, device_memory, format_record

GIB = 2**30

RECORD = {
    "step": 12,
    "loss": 1.23456,
    "loss_mle": 1.1,
    "loss_rto": 2.345,
    "grad_norm": 0.51234,
    "lr": 2e-5,
    "skipped": False,
    "skipped_total": 0,
    "tokens": 16_384,
    "useful_tokens": 16_000,
    "labelled_tokens": 8_000,
    "attended_tokens": 200.5,
    "seconds": 0.5,
    "input_seconds": 0.005,
}
SPEEDS = {
    "tokens_per_second_per_chip": 8_192.0,
    "useful_tokens_per_second_per_chip": 8_000.0,
    "mfu": 0.41234,
    "hbm_bytes": int(11.2 * GIB),
    "hbm_peak_bytes": 13 * GIB,
    "hbm_limit_bytes": int(15.75 * GIB),
}
NOWHERE = {"mfu": None, "hbm_bytes": None, "hbm_peak_bytes": None, "hbm_limit_bytes": None}
METER = Meter(TrainFlops(600, 300, 2), peak=1e9, chips=4)


@pytest.fixture
def watch_of(tmp_path):
    """A watch whose console is kept, and the ledger it reads."""

    def make(steps=1032, seconds_between_lines=0.0, meter=METER):
        console = Console(file=io.StringIO(), width=400)
        ledger = Ledger(tmp_path)
        return Watch(console, 0, steps, seconds_between_lines, ledger, meter), ledger

    return make


def lines_of(watch):
    return watch.console.file.getvalue().splitlines()


def test_the_line_has_all_that_the_record_knows():
    assert format_record(RECORD | SPEEDS | {"skipped_total": 2}, 1032, 3723.0) == (
        "step   12/1032  eta 1:02:03  loss 1.2346 (mle 1.1000, rto 2.3450)  grad 0.512  lr 2.00e-05  500 ms  "
        "tokens/s/chip 8,000 useful, 8,192 padded  MFU 41.2%  HBM 11.2/15.8 GiB, peak 13.0  input 1%  skipped 2"
    )


def test_what_is_unknown_is_left_out_of_the_line():
    line = format_record(RECORD | SPEEDS | NOWHERE | {"loss_rto": None}, 1032, None)
    assert "eta -" in line
    assert "(mle 1.1000)" in line
    assert "MFU" not in line
    assert "HBM" not in line
    assert "skipped" not in line


def test_a_loss_that_is_not_finite_is_shown_as_it_is():
    line = format_record(RECORD | SPEEDS | {"loss": float("nan"), "grad_norm": float("inf")}, 1032, None)
    assert "loss nan" in line
    assert "grad inf" in line


def test_mfu_is_the_models_flops_over_what_the_chips_could_have_done():
    flops = 16_000 * 600 + 8_000 * 300 + 2 * 16_000 * 200.5
    assert METER.speeds(RECORD, seconds=0.5) == {
        "tokens_per_second_per_chip": 16_384 / 0.5 / 4,
        "useful_tokens_per_second_per_chip": 16_000 / 0.5 / 4,
        "mfu": pytest.approx(flops / (0.5 * 4 * 1e9)),
    }


def test_the_meter_of_a_cpu_knows_no_peak():
    sections = {"model": {"path": "model"}, "data": {"path": "data"}, "train": {"output": "run", "steps": 1}}
    config = RunConfig.model_validate(sections)
    model = ModelConfig("llama", 64, 16, 32, layers=2, heads=2, kv_heads=1, head_dim=8)
    meter = Meter.of(config, model, make_mesh(config.mesh))
    assert meter == Meter(train_flops(model), None, 8)
    assert meter.speeds(RECORD, 0.5)["mfu"] is None


def test_a_lap_leaves_out_what_is_no_part_of_a_step(watch_of):
    watch, ledger = watch_of()
    with watch, ledger.spending("step"):
        time.sleep(0.02)
        with ledger.spending("input"):
            time.sleep(0.02)
        for name in ("checkpoint", "held_out", "compile"):
            with ledger.spending(name):
                time.sleep(0.1)
        lap = watch.lap()
    assert 0.04 <= lap.seconds < 0.15
    assert 0.02 <= lap.input_seconds <= lap.seconds - 0.02


def test_the_first_and_the_last_line_always_appear_and_others_now_and_then(watch_of):
    watch, _ = watch_of(steps=5, seconds_between_lines=3600.0)
    for step in range(1, 6):
        watch.show(watch.measured(RECORD | {"step": step}))
    assert [line.split()[1] for line in lines_of(watch)] == ["1/5", "5/5"]
    watch, _ = watch_of(steps=5, seconds_between_lines=0.0)
    for step in range(1, 6):
        watch.show(watch.measured(RECORD | {"step": step}))
    assert len(lines_of(watch)) == 5


def test_the_first_step_says_nothing_about_the_others(watch_of):
    watch, _ = watch_of(steps=100)
    for step, seconds in enumerate((60.0, 1.0, 2.0, 3.0), start=1):
        watch.show(watch.measured(RECORD | {"step": step, "seconds": seconds}))
    assert watch.step_seconds == 2.0
    assert "eta -" in lines_of(watch)[0]
    assert "eta 3:12" in lines_of(watch)[-1]


def test_the_summary_is_valid_json_even_when_the_loss_is_not_finite(watch_of):
    watch, _ = watch_of()
    watch.show(watch.measured(RECORD | {"loss": np.float64("nan")}))
    summary = watch.summary()
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    assert summary["loss"] is None
    assert summary["step_seconds"] == 0.5
    assert summary["useful_tokens_per_second"] == 32_000
    assert summary["useful_tokens_per_second_per_chip"] == 8_000


def test_a_watch_that_saw_no_step_has_a_summary(watch_of):
    watch, _ = watch_of()
    assert watch.summary() == {"step_seconds": None, "loss": None}


def test_a_cpu_has_no_memory_figures():
    assert device_memory() == {"hbm_bytes": None, "hbm_peak_bytes": None, "hbm_limit_bytes": None}


def test_memory_is_that_of_the_fullest_device_and_read_once_a_second(watch_of, monkeypatch):
    reads = []

    def device(in_use):
        def memory_stats():
            reads.append(in_use)
            return {"bytes_in_use": in_use, "peak_bytes_in_use": in_use + 1, "bytes_limit": 9}

        return SimpleNamespace(memory_stats=memory_stats)

    monkeypatch.setattr(jax, "local_devices", lambda: [device(3), device(5)])
    watch, _ = watch_of()
    for _ in range(10):
        record = watch.measured(RECORD)
    assert (record["hbm_bytes"], record["hbm_peak_bytes"], record["hbm_limit_bytes"]) == (5, 6, 9)
    assert reads == [3, 5]
    monkeypatch.setattr(module, "MEMORY_SECONDS", 0.0)
    watch.measured(RECORD)
    assert reads == [3, 5, 3, 5]


def test_watching_a_step_takes_well_below_a_millisecond(watch_of):
    watch, ledger = watch_of(steps=1000, seconds_between_lines=2.0)
    with watch:
        started = time.thread_time()
        for step in range(1, 501):
            lap = watch.lap()
            watch.show(watch.measured(RECORD | {"step": step} | Lap(1.0, lap.input_seconds)._asdict()))
            ledger.finished(step)
        assert (time.thread_time() - started) / 500 < 0.5e-3
