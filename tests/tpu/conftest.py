"""A cloud in a directory, with `gcloud` on PATH, and `tpu/pod` as a process that talks to it."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
STAND_IN = Path(__file__).parent / "stand_in.py"
ON_A_WORKER = ("curl", "sudo", "systemd-run", "systemctl", "python3")

ENV = """\
NAME=derta-8b
PROJECT=my-project
ZONE=us-west4-a
SLICE=v5e-16
TIER=spot
BUCKET=gs://my-bucket
"""

QUEUE = ["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]

TRAIN = """\
# counts to five in the bucket, wherever it was stopped
set -eu
trap 'echo told to stop; exit 75' TERM
step=$(gcloud storage cat gs://my-bucket/runs/x/step 2>/dev/null || echo 0)
echo "begins at $step"
while [ "$step" -lt 5 ]; do
  step=$((step + 1))
  sleep 0.2
  echo "$step" | gcloud storage cp - gs://my-bucket/runs/x/step
  echo "step $step"
  [ "$step" -ne 2 ] || touch_when_two
done
echo {} | gcloud storage cp - gs://my-bucket/runs/x/checkpoints/5/manifest.json
"""


class Cloud:
    """The stand-in, the user's directory, and what was asked of the one from the other."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.home = folder / "cloud", folder / "home"
        (self.folder / "bucket").mkdir(parents=True)
        self.home.mkdir()
        programs = folder / "bin"
        programs.mkdir()
        for name in ("gcloud", *ON_A_WORKER):
            (programs / name).write_text(f'#!/bin/sh\nexec {sys.executable} -S -E {STAND_IN} {name} "$@"\n')
            (programs / name).chmod(0o755)
        self.environment = {**os.environ, "CLOUD": str(self.folder), "PATH": f"{programs}:{os.environ['PATH']}"}
        self.plays()
        self.settings()
        (self.home / "train.sh").write_text(TRAIN.replace("touch_when_two", ":"))

    def plays(self, *requests: dict[str, Any], **scenario: Any) -> None:
        """What becomes of each request in turn (the last for all that follow), and what else goes wrong."""
        scenario["requests"] = requests or [{"states": QUEUE}]
        (self.folder / "scenario.json").write_text(json.dumps(scenario))

    def settings(self, **changes: str) -> None:
        """The env file, with these keys in place of or besides those of `ENV`."""
        values = dict(line.split("=", 1) for line in ENV.splitlines()) | changes
        (self.home / "env").write_text("".join(f"{key}={value}\n" for key, value in values.items()))

    def start(self, *words: str, every: str = "0.1") -> subprocess.Popen[str]:
        """`tpu/pod` with these words, as a process."""
        return subprocess.Popen(
            [sys.executable, str(ROOT / "tpu/pod"), "--env", "env", "--every", every, *words],
            cwd=self.home,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def pod(self, *words: str) -> subprocess.CompletedProcess[str]:
        """`tpu/pod`, to its end."""
        process = self.start(*words)
        out, err = process.communicate(timeout=100)
        return subprocess.CompletedProcess(words, process.returncode, out, err)

    def calls(self, word: str = "", on_worker: bool = False) -> list[str]:
        """The command lines so far that hold a word."""
        path = self.folder / "calls.jsonl"
        records = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        lines = [shlex.join(record["words"]) for record in records if record["on_worker"] == on_worker]
        return [line for line in lines if word in line]

    def refusals(self, *lines: str) -> str:
        """What `gcloud` would say against these command lines, nothing where it takes them."""
        words = [[word for word in shlex.split(line) if word != "<<END"][1:] for line in lines]
        return subprocess.run(
            [sys.executable, "-c", f"import stand_in\nfor line in {words!r}: stand_in.parse(line)"],
            cwd=STAND_IN.parent,
            env={**self.environment, "PYTHONPATH": str(STAND_IN.parent)},
            capture_output=True,
            text=True,
        ).stderr

    def object(self, name: str) -> Path:
        """Of the bucket."""
        return self.folder / "bucket" / "my-bucket" / name

    @property
    def request(self) -> bool:
        """Whether there is one: what costs money."""
        return (self.folder / "request.json").exists()

    def processes(self) -> list[int]:
        """Of all workers there have been, those that run."""
        pids = [int(path.read_text()) for path in self.folder.glob("*/*/units/*")]
        return [pid for pid in pids if _alive(pid)]

    def outputs(self) -> str:
        """What all workers there have been printed."""
        return "".join(path.read_text() for path in sorted(self.folder.glob("*/*/*.out")))

    def wait_for(self, what: Callable[[], Any], seconds: float = 30.0) -> None:
        """Until it is true."""
        deadline = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < deadline, f"in vain\n{self.calls()}\n{self.outputs()}"
            time.sleep(0.05)

    def end(self) -> None:
        """No process outlives a test."""
        for pid in self.processes():
            os.killpg(pid, signal.SIGKILL)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture
def cloud(tmp_path: Path) -> Iterator[Cloud]:
    """An empty one in which a request becomes ACTIVE at the third look."""
    made = Cloud(tmp_path)
    yield made
    made.end()


@pytest.fixture(autouse=True)
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here `pip wheel` makes an empty file: tests/test_wheel.py builds the real one."""
    package = tmp_path / "site" / "pip"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "__main__.py").write_text(
        "import pathlib, sys\n"
        "folder = sys.argv[sys.argv.index('--wheel-dir') + 1]\n"
        "pathlib.Path(folder, 'derta_jax-0.1.0-py3-none-any.whl').write_bytes(b'a wheel')\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(package.parent))
