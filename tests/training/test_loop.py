"""Training end to end on the tiny model: what is written, exact resume, and stops that lose nothing."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from derta_jax.errors import RunFailed, StoppedEarly, UserError
from derta_jax.training import loop
from derta_jax.training.checkpoint import Checkpoints
from derta_jax.training.loop import train
from tests.training.conftest import losses_of, metrics_of, stop_after


def test_a_run_directory_holds_what_programs_rely_on(run_config, console):
    config = run_config()
    summary = train(config, console)
    output = Path(config.train.output)
    assert {path.name for path in output.iterdir()} >= {
        "config.yaml", "metrics.jsonl", "checkpoints", "tensorboard", "summary.json"
    }  # fmt: skip
    records = metrics_of(config)
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    assert records[0].keys() >= {
        "step", "loss", "loss_mle", "loss_rto", "grad_norm", "lr", "tokens", "useful_tokens", "labelled_tokens",
        "seconds",
    }  # fmt: skip
    assert summary["loss"] == records[-1]["loss"]
    assert any((output / "tensorboard").iterdir())


def test_the_loss_falls(run_config, console):
    config = run_config(train={"steps": 20, "learning_rate": 3e-3})
    train(config, console)
    losses = losses_of(config)
    assert losses[-1] < 0.8 * losses[0]


def test_the_first_loss_is_the_one_before_any_update(run_config, console):
    slow, fast = run_config("slow"), run_config("fast", train={"learning_rate": 0.1})
    train(slow, console)
    train(fast, console)
    assert losses_of(slow)[0] == losses_of(fast)[0]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_saves_and_the_same_command_goes_on_to_the_same_bits(run_config, console, monkeypatch, number):
    whole, stopped = run_config("whole"), run_config("stopped")
    train(whole, console)
    with monkeypatch.context() as patch:
        stop_after(3, patch, number)
        with pytest.raises(StoppedEarly, match="after step 5 of 6, saved"):
            train(stopped, console)
    train(stopped, console)
    assert losses_of(stopped) == losses_of(whole)
    assert [record["step"] for record in metrics_of(stopped)] == [1, 2, 3, 4, 5, 6]


def test_a_killed_run_goes_on_from_its_newest_checkpoint_to_the_same_bits(run_config, console, monkeypatch):
    whole, killed = run_config("whole"), run_config("killed")
    train(whole, console)

    class Killed(BaseException):
        """Like kill -9: nothing catches it, nothing is saved."""

    original = loop.step_record

    def die_at_five(number, *args):
        if number == 5:
            raise Killed
        return original(number, *args)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "step_record", die_at_five)
        with pytest.raises(Killed):
            train(killed, console)
    train(killed, console)
    assert losses_of(killed) == losses_of(whole)


def test_a_finished_run_is_not_trained_again(run_config, console):
    config = run_config()
    summary = train(config, console)
    before = losses_of(config)
    assert train(config, console) == summary
    assert losses_of(config) == before


def test_resuming_works_on_another_mesh_and_with_other_remat(run_config, console, monkeypatch):
    whole, moved = run_config("whole"), run_config("moved", mesh={"fsdp": 4, "tensor": 2})
    train(whole, console)
    with monkeypatch.context() as patch:
        stop_after(3, patch)
        with pytest.raises(StoppedEarly):
            train(moved, console)
    train(run_config("moved", mesh={"data": 2, "fsdp": 4}, train={"remat": "full"}), console)
    assert losses_of(moved) == pytest.approx(losses_of(whole), rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": {"seed": 1}}, "train.seed: 0 in the checkpoint, 1 now"),
        ({"data": {"recipe": "vanilla"}}, "data.recipe: 'derta' in the checkpoint, 'vanilla' now"),
        ({"train": {"learning_rate": 2e-3}}, "train.learning_rate"),
    ],
)
def test_a_run_that_changed_is_not_resumed(run_config, console, changes, message):
    train(run_config(), console)
    with pytest.raises(UserError, match=message):
        train(run_config(**changes), console)


def test_a_dry_run_writes_no_checkpoint_and_no_metrics(run_config, console):
    config = run_config()
    assert train(config, console, dry_run=True) == {}
    assert not (Path(config.train.output) / "metrics.jsonl").exists()
    assert not (Path(config.train.output) / "checkpoints").exists()


def test_packing_trains_on_the_same_losses_as_rows_alone(run_config, console):
    packed = run_config("packed", train={"batch_size": 22})
    alone = run_config("alone", train={"batch_size": 22}, data={"packing": "none"})
    train(packed, console)
    train(alone, console)
    assert losses_of(packed) == pytest.approx(losses_of(alone), rel=1e-4)
    tokens = [sum(record["tokens"] for record in metrics_of(config)) for config in (packed, alone)]
    assert tokens[0] < tokens[1]


def test_accumulation_trains_on_the_same_losses(run_config, console):
    once, thrice = run_config("once"), run_config("thrice", train={"accumulation": 3})
    train(once, console)
    train(thrice, console)
    assert losses_of(once) == pytest.approx(losses_of(thrice), rel=1e-4)


def test_paper_mode_trains(run_config, console):
    config = run_config(data={"packing": "none", "paper": True}, objective={"paper": True, "sorry_keep_rate": 0.5})
    train(config, console)
    assert len(losses_of(config)) == 6


def test_progress_lines_say_where_the_run_is(run_config, capsys):
    train(run_config(), Console(width=200))
    printed = capsys.readouterr().out
    assert "step 1/6" in printed
    assert "step 6/6  eta 0:00" in printed
    assert "tokens/s" in printed


FULL_DISK = """
import os, shutil, sys
os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0"
from derta_jax.cli import main
from derta_jax.training import loop

def first_state_then_a_full_disk(run, *args):
    state = original(run, *args)
    free = shutil.disk_usage(run.output.parent).free
    (run.output.parent / "filler").write_bytes(bytes(free - 200_000))
    return state

original, loop.first_state = loop.first_state, first_state_then_a_full_disk
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_full_disk_while_saving_is_said_in_a_sentence(run_config, tmp_path, tiny_llama, rows_file):
    """A real one: the run directory is a file system of a few megabytes, which something else fills meanwhile."""
    if not shutil.which("unshare") or os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root and unshare")
    mount = tmp_path / "small"
    mount.mkdir()
    probe = subprocess.run(["unshare", "-m", "mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(mount)])
    if probe.returncode:
        pytest.skip("this system does not let a test mount a file system")
    script = tmp_path / "run.py"
    script.write_text(FULL_DISK)
    config = Path(__file__).parents[2] / "configs" / "tiny.yaml"
    command = (
        f"mount -t tmpfs -o size=4m tmpfs {mount} && exec {sys.executable} {script} train {config} "
        f"model.path={tiny_llama} data.path={rows_file} train.output={mount}/run train.steps=2 "
        f"train.sequence_length=96"
    )
    ended = subprocess.run(
        ["unshare", "-m", "sh", "-c", command], capture_output=True, text=True, cwd=Path(__file__).parents[2]
    )
    assert ended.returncode == 2, ended.stderr
    assert "the disk is full: step 2 could not be saved" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_damaged_checkpoint_is_said_and_training_goes_on_from_the_one_before_to_the_same_bits(run_config, capsys):
    whole, damaged = run_config("whole"), run_config("damaged")
    train(whole, Console(quiet=True))
    train(damaged, Console(quiet=True))
    output = Path(damaged.train.output)
    (output / "summary.json").unlink()
    file = max((output / "checkpoints" / "6").rglob("*"), key=lambda path: path.stat().st_size)
    file.write_bytes(file.read_bytes()[:-1])
    train(damaged, Console(soft_wrap=True))
    said = capsys.readouterr().out
    assert "the checkpoint of step 6 is damaged" in said
    assert file.name in said
    assert "goes on from step 4" in said
    assert losses_of(damaged) == losses_of(whole)


def test_steps_without_a_finite_loss_are_skipped_and_too_many_in_a_row_end_the_run(run_config, console):
    config = run_config(train={"learning_rate": 1e30, "warmup": 0.0, "skip_limit": 3, "clip": None, "steps": 8})
    with pytest.raises(RunFailed, match=r"steps 2 to 4 had no finite loss and gradient \(train.skip_limit is 3\)"):
        train(config, console)
    records = metrics_of(config)
    assert [record["skipped"] for record in records] == [False, True, True, True]
    assert [record["loss"] is None for record in records] == [False, True, True, True]
    rows = json.loads((Path(config.train.output) / "non_finite.json").read_text())
    assert list(rows) == ["2", "3", "4"]
    assert all(rows.values())


def test_saving_by_the_clock(run_config, console):
    config = run_config(checkpoint={"every_steps": None, "every_minutes": 1e-9, "keep": 99})
    train(config, console)
    with Checkpoints(Path(config.train.output) / "checkpoints", keep=None) as checkpoints:
        assert checkpoints.steps == [1, 2, 3, 4, 5, 6]


def test_held_out_rows_are_looked_at_and_rank_the_checkpoints(run_config, example_rows, capsys):
    config = run_config(
        train={"learning_rate": 3e-2},
        held_out={"path": str(example_rows), "every_steps": 2, "refusal_curves": True},
        checkpoint={"keep": 1, "keep_best": 1, "every_steps": 1},
    )
    train(config, Console(soft_wrap=True))
    output = Path(config.train.output)
    looks = [json.loads(line) for line in (output / "held_out.jsonl").read_text().splitlines()]
    losses = {look["step"]: look["held_out_loss"] for look in looks}
    assert list(losses) == [0, 1, 2, 3, 4, 5, 6]
    assert looks[0]["refusal_harmful"][0].keys() == {"from", "to", "p", "n"}
    best = min(range(1, 7), key=lambda step: losses[step])
    with Checkpoints(output / "checkpoints", keep=None) as checkpoints:
        assert checkpoints.steps == sorted({best, 6})
    assert "step 2  held out  loss" in capsys.readouterr().out


def test_a_summary_says_where_the_time_went(run_config, console, monkeypatch):
    config = run_config()
    with monkeypatch.context() as patch:
        stop_after(2, patch)
        with pytest.raises(StoppedEarly):
            train(config, console)
    goodput = train(config, console)["goodput"]
    assert goodput["attempts"] == 2
    assert goodput["steps_repeated"] == 0
    assert goodput["seconds"]["compile"] > 0
    assert sum(goodput["seconds"].values()) == pytest.approx(goodput["total_seconds"])


def test_a_profile_is_written_on_request(run_config, console):
    config = run_config()
    train(config, console, profile_steps=1)
    assert list((Path(config.train.output) / "profile").rglob("*.xplane.pb"))
