import json
import resource
import sys
import time

import numpy as np
import pytest
import wandb
from etils import epath
from rich.console import Console
from tensorboardX.proto.event_pb2 import Event

from derta_jax.errors import UserError
from derta_jax.objectives.objective import Mean
from derta_jax.training.watching.metrics import Lap, MetricsWriter, step_record
from derta_jax.training.watching.sinks import check_wandb, keep_until
from tests.training.bucket import bucket

__all__ = ["bucket"]

SUMS = {
    "loss_mle": Mean(6.0, 3.0),
    "loss_rto": Mean(4.0, 1.0),
    "loss_sum": 10.0,
    "weight_sum": 4.0,
    "grad_norm": 0.5,
    "skipped": False,
    "updates": 0,
    "learning_rate": 1e-3,
}


def batch_of(*rows, length=8):
    """One packed sequence a tuple of row lengths; the last token of each row is labelled."""
    shape = (1, len(rows), length)
    batch = {name: np.zeros(shape, np.int32) for name in ("token_ids", "segment_ids", "positions")}
    batch["keep"] = np.zeros(shape, bool)
    for index, lengths in enumerate(rows):
        start = 0
        for segment, count in enumerate(lengths, start=1):
            place = (0, index, slice(start, start + count))
            batch["segment_ids"][place] = segment
            batch["positions"][place] = np.arange(count)
            batch["keep"][0, index, start + count - 1] = True
            start += count
    return batch


def record_of(step=1, window=None, **sums):
    return step_record(step, SUMS | sums, batch_of((2, 4), (3,)), Lap(0.5, 0.1), window)


@pytest.fixture
def console():
    return Console(record=True, width=300)


@pytest.fixture
def writer_of(tmp_path, console):
    def make(resumed_step=0, output=tmp_path, **options):
        return MetricsWriter(output, resumed_step, console, **options)

    return make


def wait_until(condition):
    """What the writer's thread does, it does soon."""
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def text_of(file):
    return file.read_text() if file.exists() else ""


def lines_of(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def events_in(directory):
    """TensorBoard's events, oldest file first."""
    for file in sorted(directory.iterdir()):
        content = file.read_bytes()
        while content:
            size = int.from_bytes(content[:8], "little")
            yield Event.FromString(content[12 : 12 + size])
            content = content[12 + size + 4 :]


def scalars_in(directory, tag):
    return [
        (event.step, value.simple_value)
        for event in events_in(directory)
        for value in event.summary.value
        if value.tag == tag
    ]


def test_a_record_has_means_by_kind_and_counts_of_tokens():
    record = record_of()
    assert record["loss"] == 2.5
    assert (record["loss_mle"], record["loss_rto"]) == (2.0, 4.0)
    assert (record["tokens"], record["useful_tokens"], record["labelled_tokens"]) == (16, 9, 3)
    assert (record["seconds"], record["input_seconds"]) == (0.5, 0.1)


def test_a_kind_without_tokens_has_no_loss():
    assert record_of(loss_rto=Mean(0.0, 0.0))["loss_rto"] is None


@pytest.mark.parametrize(("window", "expected"), [(None, (3 + 10 + 6) / 9), (2, (3 + 7 + 5) / 9)])
def test_attended_tokens_are_those_of_the_same_row_before_a_token_and_itself(window, expected):
    assert record_of(window=window)["attended_tokens"] == pytest.approx(expected)


def test_skipped_steps_are_those_that_made_no_update():
    assert record_of(step=7, updates=6)["skipped_total"] == 0
    record = record_of(step=7, updates=4, skipped=True)
    assert record["skipped"] is True
    assert record["skipped_total"] == 3


def test_what_is_not_finite_is_null_in_the_file_and_missing_in_tensorboard(tmp_path, writer_of):
    with writer_of() as writer:
        writer.write(record_of(1, loss_sum=float("nan"), grad_norm=float("inf"), skipped=True))
        writer.write(record_of(2))
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    first, second = lines_of(tmp_path / "metrics.jsonl")
    assert first["loss"] is None
    assert first["grad_norm"] is None
    assert second["loss"] == 2.5
    assert scalars_in(tmp_path / "tensorboard", "train/loss") == [(2, 2.5)]
    assert scalars_in(tmp_path / "tensorboard", "train/skipped") == [(1, 1.0), (2, 0.0)]


def test_a_step_is_in_the_file_soon_and_without_asking(tmp_path, writer_of):
    with writer_of() as writer:
        writer.write(record_of())
        wait_until(lambda: text_of(tmp_path / "metrics.jsonl"))
        assert lines_of(tmp_path / "metrics.jsonl")[0]["step"] == 1


def test_writing_a_step_takes_no_time_of_the_loop(writer_of):
    with writer_of() as writer:
        record = record_of()
        started = time.thread_time()
        for _ in range(1000):
            writer.write(record)
        assert (time.thread_time() - started) / 1000 < 50e-6


def test_held_out_records_have_their_own_file_and_place(tmp_path, writer_of):
    with writer_of() as writer:
        writer.write_held_out({"step": 4, "loss": np.float32(1.5), "curve": np.array([0.25, np.nan])})
    assert lines_of(tmp_path / "held_out.jsonl") == [{"step": 4, "loss": 1.5, "curve": [0.25, None]}]
    assert scalars_in(tmp_path / "tensorboard", "held_out/loss") == [(4, 1.5)]
    assert not (tmp_path / "metrics.jsonl").exists()


def test_steps_after_the_resumed_one_are_dropped_and_the_last_of_them_is_known(tmp_path, writer_of):
    with writer_of() as writer:
        for step in range(1, 6):
            writer.write(record_of(step))
        writer.write_held_out({"step": 2})
        writer.write_held_out({"step": 4})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    with writer_of(3) as writer:
        assert writer.reached == 5
        writer.write(record_of(4))
    assert [line["step"] for line in lines_of(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]
    assert [line["step"] for line in lines_of(tmp_path / "held_out.jsonl")] == [2]
    starts = [event.step for event in events_in(tmp_path / "tensorboard") if event.HasField("session_log")]
    assert starts == [1, 4]


def test_a_run_that_starts_anew_keeps_nothing(tmp_path, writer_of):
    for _ in range(2):
        with writer_of() as writer:
            writer.write_held_out({"step": 0})
            writer.write(record_of(1))
    assert lines_of(tmp_path / "held_out.jsonl") == [{"step": 0}]
    assert len(lines_of(tmp_path / "metrics.jsonl")) == 1


def test_a_damaged_line_is_dropped(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b'{"step": 1}\n\x00\x00\xff\n[]\n{"step": 2}\n')
    assert keep_until(file, 9) == 2
    assert lines_of(file) == [{"step": 1}, {"step": 2}]


def test_on_a_full_disk_figures_wait_and_nothing_is_lost(tmp_path, writer_of, console):
    """A limit on the size of files stands for the disk: the write that crosses it comes back cut off."""
    file = tmp_path / "metrics.jsonl"
    with writer_of() as writer:
        writer.write(record_of(1))
        wait_until(lambda: text_of(file))
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (file.stat().st_size + 20, hard))
        try:
            writer.write(record_of(2))
            wait_until(lambda: writer._troubles)
            writer.write(record_of(3))
            wait_until(writer._queue.empty)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        writer.write(record_of(4))
    assert [line["step"] for line in lines_of(file)] == [1, 2, 3, 4]
    assert sorted(set(scalars_in(tmp_path / "tensorboard", "train/loss"))) == [(step, 2.5) for step in (1, 2, 3, 4)]
    assert console.export_text().count("cannot write to metrics.jsonl") == 1


def test_in_a_bucket_the_figures_appear_with_each_sync_and_a_restart_goes_on_there(writer_of, bucket):
    run = epath.Path(bucket)
    with writer_of(output=bucket) as writer:
        writer.write(record_of(1))
        writer.sync()
        wait_until(lambda: text_of(run / "metrics.jsonl"))
        assert [line["step"] for line in lines_of(run / "metrics.jsonl")] == [1]
        writer.write(record_of(2))
        writer.write_held_out({"step": 2})
    with writer_of(1, output=bucket) as writer:
        assert writer.reached == 2
        writer.write(record_of(2))
    assert [line["step"] for line in lines_of(run / "metrics.jsonl")] == [1, 2]
    assert lines_of(run / "held_out.jsonl") == []
    assert len(list((run / "tensorboard").iterdir())) == 2


def test_a_bucket_that_cannot_be_reached_leaves_the_figures_here(writer_of, bucket, console, monkeypatch):
    with writer_of(output=bucket) as writer:
        writer.write(record_of(1))
        monkeypatch.setattr(writer._mirror, "output", epath.Path("s3://nowhere/run"))
    text = console.export_text()
    assert "cannot write to s3://nowhere/run" in text
    assert "what there is lies in" in text
    assert lines_of(writer._mirror.local / "metrics.jsonl")[0]["step"] == 1


def test_a_mistake_in_a_record_ends_the_run_instead_of_losing_figures(writer_of):
    writer = writer_of()
    writer.write({"step": 1, "loss": object()})
    with pytest.raises(TypeError, match="JSON"):
        writer.close()


def wandb_files(directory):
    return sorted((directory / "wandb").glob("offline-run-*/*.wandb"))


def test_attempts_go_on_in_the_same_run_at_weights_and_biases(tmp_path, writer_of, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for attempt in (1, 2):
        with writer_of(attempt - 1, wandb="project", config={"train": {"steps": 2}}) as writer:
            writer.write(record_of(attempt))
            writer.write_held_out({"step": attempt, "loss": 1.0})
        time.sleep(1.1)  # W&B's folders are named by the second
    files = wandb_files(tmp_path)
    name = (tmp_path / "wandb_id").read_text()
    assert [file.name for file in files] == [f"run-{name}.wandb"] * 2
    for file in files:
        assert b"train/loss" in file.read_bytes()
        assert b"held_out/loss" in file.read_bytes()


def test_weights_and_biases_that_do_not_start_are_the_users_to_mend(writer_of, monkeypatch):
    def refuse(**_):
        raise wandb.errors.UsageError("api_key not configured (no-tty)")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(UserError, match=r"watch\.wandb: .*api_key.*wandb login.*WANDB_MODE=offline"):
        writer_of(wandb="project")


def test_without_the_package_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "wandb")
    (tmp_path / "wandb").mkdir()  # what W&B writes into the working directory is not the package
    with pytest.raises(UserError, match=r"pip install 'derta-jax\[wandb\]'"):
        check_wandb()
