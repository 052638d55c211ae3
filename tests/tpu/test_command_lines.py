"""What is asked of `gcloud`, word for word, and what a dry run shows of it."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tpu.conftest import ENV, ROOT, Cloud
from tests.tpu.read_flags import TABLE, installed_sdk, read_flags
from tpu import command_lines
from tpu.settings import Pod, read_env

CREATE = """\
compute tpus queued-resources create derta-8b --project my-project --zone us-west4-a --node-id derta-8b
--accelerator-type v5litepod-16 --runtime-version v2-alpha-tpuv5-lite --spot
--scopes https://www.googleapis.com/auth/cloud-platform --labels app=derta-jax
--metadata derta-attempt=1,derta-extras=tpu+gcs,derta-name=derta-8b,derta-project=my-project,derta-seconds=86400,\
derta-slices=1,derta-url=gs://my-bucket/pods/derta-8b,derta-zone=us-west4-a
--metadata-from-file startup-script=worker.sh --quiet"""


def pod(tmp_path: Path, more: str = "") -> Pod:
    (tmp_path / "env").write_text(ENV + more)
    return read_env(tmp_path / "env")


def test_create(tmp_path: Path) -> None:
    assert shlex.join(command_lines.create(pod(tmp_path), 1, Path("worker.sh"))) == " ".join(CREATE.splitlines())


def test_create_with_everything(tmp_path: Path) -> None:
    text = ENV.replace("TIER=spot", "TIER=reserved").replace("v5e-16", "2xv5p-64")
    (tmp_path / "env").write_text(
        f"{text}RUNTIME=mine\nSERVICE_ACCOUNT=a@b.c\nNETWORK=n\nSUBNETWORK=s\nINTERNAL_IPS=yes\n"
    )
    line = shlex.join(command_lines.create(read_env(tmp_path / "env"), 3, Path("worker.sh")))
    assert "--node-count 2 --node-prefix derta-8b --accelerator-type v5p-64 --runtime-version mine --reserved" in line
    assert "--service-account a@b.c --network n --subnetwork s --internal-ips --quiet" in line
    assert "derta-attempt=3" in line
    assert "derta-slices=2" in line
    assert "--spot" not in line


def test_an_ssh_connection_is_kept_alive_and_asks_nothing(tmp_path: Path) -> None:
    assert shlex.join(command_lines.ssh(pod(tmp_path), "derta-8b", "all", "true")) == (
        "compute tpus tpu-vm ssh derta-8b --project my-project --zone us-west4-a --worker all "
        "--strict-host-key-checking no '--ssh-flag=-o ServerAliveInterval=30' "
        "'--ssh-flag=-o ServerAliveCountMax=4' --command true"
    )
    inside = command_lines.ssh(pod(tmp_path, "INTERNAL_IPS=yes\n"), "derta-8b", "0")
    assert inside[-1] == "--internal-ip"


@pytest.mark.parametrize(
    "command",
    [
        ("create",),
        ("setup",),
        ("run", "derta", "train", "c.yaml", "train.output=gs://my-bucket/runs/x"),
        ("logs",),
        ("status",),
        ("ssh", "--worker", "1", "nvtop"),
        ("delete",),
    ],
    ids=lambda command: command[0],
)
def test_a_dry_run_shows_command_lines_that_gcloud_takes_and_runs_none(cloud: Cloud, command: tuple[str, ...]) -> None:
    shown = cloud.pod("--dry-run", *command)
    assert shown.returncode == 0, shown.stderr
    assert not cloud.calls()
    lines = [line.strip() for line in shown.stdout.splitlines() if line.strip().startswith("gcloud ")]
    assert lines
    assert not cloud.refusals(*lines)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (("run",), "no job to go on with: tpu/pod run COMMAND …"),
        (("run", "derta", "train", "c.yaml"), "train.output=… would lie on the pod's disks and go with them"),
        (("run", "derta", "train", "c.yaml", "train.output=runs/x"), "train.output=runs/x would lie on"),
        (("run", "--with", "absent", "true"), "--with absent: give a path that is there, beneath this directory"),
        (("run", "--with", "/etc/passwd", "true"), "--with /etc/passwd: give a path that is there"),
        (("ssh", "--slice", "1"), "--slice 1: derta-8b has slices 0 to 0"),
        (("--env", "nowhere", "create"), "nowhere is not there: copy tpu/env.example to it"),
    ],
)
def test_mistakes_are_answered_before_anything_is_asked_for(
    cloud: Cloud, command: tuple[str, ...], message: str
) -> None:
    ran = cloud.pod(*command)
    assert ran.returncode == 2
    assert message in ran.stderr
    assert "Traceback" not in ran.stderr
    assert not cloud.calls("create")


def test_without_gcloud(cloud: Cloud) -> None:
    cloud.environment["PATH"] = os.path.dirname(shutil.which("sh") or "/bin") + "-absent"
    ran = cloud.pod("create")
    assert ran.returncode == 2
    assert "gcloud is not on PATH" in ran.stderr


def test_a_config_that_writes_to_a_bucket_needs_no_override(cloud: Cloud) -> None:
    (cloud.home / "c.yaml").write_text("train:\n  output: gs://my-bucket/runs/y  # here\n")
    shown = cloud.pod("--dry-run", "run", "derta", "train", "c.yaml")
    assert shown.returncode == 0, shown.stderr
    assert '"output": "gs://my-bucket/runs/y"' in shown.stdout
    assert "taking along: c.yaml" in shown.stdout


def test_worker_script_is_clean() -> None:
    """By ShellCheck, which comes as a Python package."""
    checker = Path(sys.executable).parent / "shellcheck"
    subprocess.run([checker, "--severity", "style", ROOT / "tpu/worker.sh"], check=True)


@pytest.mark.skipif(installed_sdk() is None, reason="no Google Cloud CLI here")
def test_the_table_of_flags_is_that_of_the_installed_sdk() -> None:
    sdk = installed_sdk()
    assert sdk is not None
    table = json.loads(TABLE.read_text(encoding="utf-8"))
    found = read_flags(sdk)
    if found["sdk"] == table["sdk"]:
        assert found == table
    for command, flags in table["commands"].items():
        assert flags.keys() <= found["commands"][command].keys()
