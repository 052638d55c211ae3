"""What `derta doctor` and the start of training find: on this machine, and on a pod of two processes."""

import re
import time
from io import StringIO
from pathlib import Path

import jax
import pytest
from etils import epath
from rich.console import Console

from derta_jax import cli
from derta_jax.config import dump_config
from derta_jax.errors import RunFailed, UserError
from derta_jax.training.pod import doctor, machine_checks, storage_checks
from derta_jax.training.pod.check import Check, differences, in_time, readable_size
from derta_jax.training.pod.doctor import check_start, run_checks, show
from derta_jax.training.pod.machine_checks import check_devices, check_memory, explain_devices, judge_clocks
from tests.training.bucket import Bucket, bucket
from tests.training.pod.workers import run_workers

__all__ = ["bucket"]


def printed(checks, **options) -> str:
    file = StringIO()
    show(checks, Console(file=file, width=300), **options)
    return file.getvalue()


def statuses(checks: list[Check]) -> dict[str, str]:
    return {check.name: check.status for check in checks}


def test_a_sound_machine_and_config_pass_every_check_and_nothing_is_left_behind(run_config, console, tmp_path):
    config = run_config("deep/run")
    before = set(tmp_path.rglob("*"))
    assert statuses(run_checks(config, console)) == dict.fromkeys(
        ("versions", "processes", "devices", "collectives", "model", "mesh", "output", "disk"), "ok"
    )
    assert set(tmp_path.rglob("*")) == before


def test_an_output_directory_that_is_there_keeps_what_it_holds(run_config, console):
    config = run_config()
    output = Path(config.train.output)
    output.mkdir()
    (output / "notes").write_text("mine")
    assert statuses(run_checks(config, console))["output"] == "ok"
    assert [file.name for file in output.iterdir()] == ["notes"]


def test_without_a_config_the_machine_alone_is_checked(capsys):
    assert cli.main(["doctor"]) == 0
    words = capsys.readouterr().out
    assert re.search(r"versions +ok +python \d.*derta_jax", words)
    assert re.search(r"devices +ok +8 × cpu", words)
    assert "output" not in words


def test_training_tells_it_in_one_line(run_config):
    file = StringIO()
    check_start(run_config(), Console(file=file, width=300))
    assert re.fullmatch(r"checks    8 of 8 ok in \d+\.\d s\n", file.getvalue())


def test_warnings_are_shown_before_training_and_failures_raised_together(run_config, console, tmp_path):
    checks = [Check("clocks", "warn", "3.0 s apart"), Check("mesh", "ok", "fits")]
    assert printed(checks, verbose=False) == "checks    1 of 2 ok\nwarn      clocks: 3.0 s apart\n"
    (tmp_path / "file").write_text("")
    config = run_config("file/run", mesh={"tensor": 3}, model={"path": str(tmp_path / "nothing")})
    with pytest.raises(UserError, match=r"(?s)^2 of 7 checks failed:\n  model: .*is no model.*\n  output: .*file/run"):
        check_start(config, console)


def test_the_commands_exit_code_is_that_of_a_users_mistake(run_config, tmp_path, capsys):
    file = tmp_path / "config.yaml"
    file.write_text(dump_config(run_config()))
    assert cli.main(["doctor", str(file), "mesh.tensor=3"]) == 2
    told = capsys.readouterr()
    assert re.search(r"mesh +fail", told.out)
    assert "mesh.tensor 3 = 6, but there are 8 devices" in told.err
    assert cli.main(["doctor", str(file), "mesh.tensor=4"]) == 2
    assert "lower mesh.tensor" in capsys.readouterr().err


def test_a_disk_too_small_for_the_checkpoints_is_told(run_config, console, monkeypatch):
    config = run_config(checkpoint={"keep": 3})
    one = 42_144 * 12

    def verdict(free: int) -> Check:
        monkeypatch.setattr(storage_checks.shutil, "disk_usage", lambda _: type("", (), {"free": free}))
        return next(check for check in run_checks(config, console) if check.name == "disk")

    monkeypatch.setattr(storage_checks, "TEMPORARY_BYTES", 0)
    assert verdict(4 * one).status == "ok"
    assert verdict(4 * one - 1).status == "warn"
    assert verdict(one).status == "warn"
    short = verdict(one - 1)
    assert short.status == "fail"
    assert "494 KiB free in" in short.text
    assert "4 checkpoints of 494 KiB are kept: free some, lower checkpoint.keep" in short.text


def test_storage_that_does_not_answer_is_not_waited_for_for_ever(run_config, console, monkeypatch):
    monkeypatch.setattr(storage_checks, "STORAGE_SECONDS", 0.2)
    monkeypatch.setattr(storage_checks, "_create", lambda *_: time.sleep(30))
    check = next(check for check in run_checks(run_config(), console) if check.name == "output")
    assert (check.status, check.text.endswith("no answer within 0.2 s")) == ("fail", True)


def test_an_output_in_a_bucket_is_written_read_and_tidied(run_config, console, monkeypatch, bucket):
    monkeypatch.setattr(storage_checks, "directory_of", epath.Path)  # which gcsfs need not be there for
    checks = run_checks(run_config(train={"output": bucket}), console)
    assert statuses(checks)["output"] == "ok"
    assert statuses(checks)["disk"] == "ok"
    assert Bucket.store == {}


def test_an_output_that_is_neither_directory_nor_bucket_is_told(run_config, console):
    check = next(
        check for check in run_checks(run_config(train={"output": "s3://x"}), console) if check.name == "output"
    )
    assert check.status == "fail"
    assert "gs:// bucket" in check.text


def test_a_cpu_used_in_place_of_a_tpu_is_a_failure_unless_asked_for(monkeypatch):
    fact = machine_checks.local_devices()
    asked = check_devices([fact | {"unused": "4 TPU chips: pip install 'derta-jax[tpu]'", "asked": True}])
    silent = check_devices([fact | {"unused": "4 TPU chips: pip install 'derta-jax[tpu]'", "asked": False}])
    assert asked.status == "warn"
    assert silent.status == "fail"
    assert "but the machine of process 0 has 4 TPU chips: pip install 'derta-jax[tpu]'" in silent.text


def test_a_gpu_that_is_not_used_is_a_warning():
    fact = machine_checks.local_devices() | {"asked": False}
    check = check_devices([fact | {"unused": "1 GPUs: pip install 'derta-jax[gpu]'"}])
    assert check.status == "warn"


def test_processes_with_different_devices_are_named():
    fact = machine_checks.local_devices() | {"count": 4}
    check = check_devices([fact, fact, fact | {"count": 3}])
    assert check.status == "fail"
    assert check.text.startswith("count 4 on process 0, 1, 3 on process 2")


@pytest.mark.parametrize(
    ("times", "error", "status", "text"),
    [
        ([100.0, 100.5, 101.0], 0.01, "ok", "within 1.00 s of each other"),
        ([100.0, 103.0], 1.5, "ok", "within 3.00 s"),
        ([100.0, 100.1, 103.0, 100.0], 0.01, "warn", "3.0 s apart, most of all that of process 2"),
        ([100.0, 10.0, 100.0], 0.01, "fail", "90.0 s apart, most of all that of process 1: let all hosts follow one"),
    ],
)
def test_clocks_are_judged_by_what_is_certain(times, error, status, text):
    check = judge_clocks(times, error)
    assert check.status == status
    assert text in check.text


def test_memory_is_that_of_the_fullest_device():
    gib = 2**30
    assert check_memory([None, None]) == []
    assert check_memory([[15 * gib, 16 * gib, 0], [16 * gib, 16 * gib, 7]]) == [
        Check("memory", "ok", "15 GiB of 16 GiB free on each device")
    ]
    (check,) = check_memory([[16 * gib, 16 * gib, 0], [3 * gib, 16 * gib, 7]])
    assert check.status == "warn"
    assert check.text.startswith("3 GiB of 16 GiB free on device 7 of process 1: look which program")


def test_what_jax_says_of_devices_in_use_becomes_advice():
    jax_says = (
        "Unable to initialize backend 'tpu': ABORTED: The TPU is already in use by process with pid 4711. Not "
        "attempting to load libtpu.so in this process. (set JAX_PLATFORMS='' to automatically choose an available "
        "backend)"
    )
    assert explain_devices(jax_says) == (
        "another program holds the devices, process 4711: end it, or wait until it is done"
    )
    assert "another program holds the devices' memory" in explain_devices("INTERNAL: CUDA_ERROR_OUT_OF_MEMORY")
    assert explain_devices("no backend") == "there are no devices: no backend"


def test_devices_that_jax_cannot_have_are_a_failed_run(console, monkeypatch):
    def refuse():
        raise RuntimeError("Unable to initialize backend 'tpu': in use by process with pid 4711")

    monkeypatch.setattr(jax, "devices", refuse)
    with pytest.raises(RunFailed, match="process 4711"):
        run_checks(None, console)


def test_different_programs_are_told_by_process_and_end_the_checks(console, monkeypatch):
    values = [{"jax": "0.10.2", "libtpu": "0.0.40"}, {"jax": "0.10.1"}, {"jax": "0.10.2", "libtpu": "0.0.40"}]
    assert list(differences(values)) == [
        "jax 0.10.2 on process 0, 2, 0.10.1 on process 1",
        "libtpu 0.0.40 on process 0, 2, missing on process 1",
    ]
    facts = [{"host": f"host-{i}", "versions": value, "config": {}} for i, value in enumerate(values)]
    monkeypatch.setattr(doctor.processes, "gather", lambda *_: facts)
    checks = run_checks(None, console)
    assert statuses(checks) == {"versions": "fail", "processes": "ok", "config": "ok"}
    assert checks[0].text.endswith("install the same on all machines")
    assert checks[1].text == "3 expected and seen, on 3 hosts: host-0, host-1, host-2"


def test_work_that_takes_too_long_is_left_behind():
    assert in_time(lambda: "done", 5.0, "late") == "done"
    with pytest.raises(ZeroDivisionError):
        in_time(lambda: 1 / 0, 5.0, "late")
    with pytest.raises(RunFailed, match="late"):
        in_time(lambda: time.sleep(30), 0.1, "late")


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (1500, "1.46 KiB"), (64.8 * 2**30, "64.8 GiB"), (2**42, "4096 GiB")]
)
def test_sizes_are_readable(count, text):
    assert readable_size(count) == text


@pytest.fixture
def pod_directories(tmp_path) -> list[Path]:
    """Where the two processes run: a relative path is another place for each."""
    places = [tmp_path / "host-0", tmp_path / "host-1"]
    for place in places:
        place.mkdir()
    return places


@pytest.mark.slow
def test_a_sound_pod_passes_every_check(run_config, tmp_path, pod_directories):
    file = tmp_path / "config.yaml"
    file.write_text(dump_config(run_config()))
    ended = run_workers(["-m", "derta_jax.cli", "doctor", str(file)], directories=pod_directories)
    assert [ended[index].code for index in range(2)] == [0, 0], ended
    lines = dict(re.findall(r"^ (\w+) +(ok|warn|fail) ", ended[0].output, re.MULTILINE))
    assert lines == dict.fromkeys(
        (
            "versions", "processes", "config", "clocks", "devices", "collectives", "model", "mesh", "output", "disk",
        ),
        "ok",
    )  # fmt: skip
    assert "8 × cpu, 4 on each process" in ended[0].output
    assert "and is shared" in " ".join(ended[0].output.split())
    assert "versions" not in ended[1].output


@pytest.mark.slow
def test_an_output_that_only_the_first_process_sees_is_refused(run_config, tmp_path, pod_directories):
    config = run_config()
    file = tmp_path / "config.yaml"
    file.write_text(dump_config(config).replace(config.train.output, "runs/mine"))
    ended = run_workers(["-m", "derta_jax.cli", "doctor", str(file)], directories=pod_directories)
    assert [ended[index].code for index in range(2)] == [2, 2], ended
    for process in ended.values():
        assert "1 of 10 checks failed" in process.output
        assert "a file that process 0 wrote is not there: train.output must be shared by all hosts" in process.output
    assert [list(place.iterdir()) for place in pod_directories] == [[], []]
