"""A job: its command and files in the bucket, and what the workers left there of its end."""

import dataclasses
import json
import re
import shlex
import tarfile
import tempfile
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path

from derta_jax.errors import UserError
from tpu import command_lines
from tpu.gcloud import Gcloud
from tpu.request import Request
from tpu.settings import Pod

SAVED_AND_STOPPED = 75
"""The exit code of `derta` when it was told to stop and has saved."""

TRAINS = {"train", "protect"}
"""Commands of `derta` whose output must outlive the pod."""


@dataclasses.dataclass(frozen=True)
class Job:
    """`name` is the time it was made; `output` the bucket's directory that it writes to, if it says so."""

    name: str
    command: tuple[str, ...]
    keep: bool = False
    output: str = ""

    def url(self, pod: Pod) -> str:
        return f"{pod.url}/jobs/{self.name}"


def make_job(command: Sequence[str], keep: bool) -> Job:
    """Raises `UserError` where a training run would lie on disks that go with the pod."""
    output = _output(command)
    if command[0] == "derta" and len(command) > 1 and command[1] in TRAINS and not output.startswith("gs://"):
        raise UserError(
            f"train.output={output or '…'} would lie on the pod's disks and go with them: "
            "give train.output=gs://BUCKET/runs/NAME"
        )
    return Job(f"{datetime.now(UTC):%Y%m%d-%H%M%S}", tuple(command), keep, output)


def _output(command: Sequence[str]) -> str:
    """By an override, or by the config itself."""
    given = [word.partition("=")[2] for word in command if word.startswith("train.output=")]
    return (given or _values(command, "output") or [""])[-1]


def _values(words: Iterable[str], key: str) -> list[str]:
    """What the YAML files among these words say of a key."""
    configs = [Path(word) for word in words if word.endswith((".yaml", ".yml")) and Path(word).is_file()]
    pattern = re.compile(rf"^\s+{key}:\s*[\"']?([^\s\"'#]+)", re.MULTILINE)
    return [value for config in configs for value in pattern.findall(config.read_text(encoding="utf-8"))]


def files_of(command: Iterable[str], more: Iterable[str]) -> list[Path]:
    """What of the command, and of configs that it names, lies here by a relative path; and what was asked for besides.

    Raises `UserError` for a path that is not there or would not lie in the job's directory.
    """
    words = [word.partition("=")[2] or word for word in command]
    named = [Path(word) for word in (*words, *_values(words, "path"))]
    found = [path for path in named if not path.is_absolute() and path.parts and path.exists()]
    for path in map(Path, more):
        if path.is_absolute() or ".." in path.parts or not path.exists():
            raise UserError(f"--with {path}: give a path that is there, beneath this directory")
        found.append(path)
    return sorted({path for path in found if ".." not in path.parts and path != Path()})


def put(cloud: Gcloud, pod: Pod, job: Job, files: Sequence[Path]) -> None:
    """Put the job into the bucket; the last object makes it the pod's current one."""
    url = job.url(pod)
    with tempfile.TemporaryDirectory() as folder:
        bundle = Path(folder) / "files.tar.gz"
        with tarfile.open(bundle, "w:gz") as tar:
            for path in files:
                tar.add(path)
        if files:
            cloud.say(f"taking along: {', '.join(map(str, files))} ({bundle.stat().st_size / 1e6:.1f} MB)")
        cloud(command_lines.upload(bundle, f"{url}/files.tar.gz"))
    if job.keep:
        cloud(command_lines.upload("-", f"{url}/keep"), "the pod stays after the job\n")
    cloud(command_lines.upload("-", f"{url}/job.json"), json.dumps(dataclasses.asdict(job)) + "\n")
    cloud(command_lines.upload("-", f"{url}/job.sh"), f"exec {shlex.join(job.command)}\n")
    cloud(command_lines.upload("-", f"{pod.url}/current"), f"{job.name}\n")


def current(cloud: Gcloud, pod: Pod) -> Job | None:
    """The job that the bucket names as the pod's; None where there is none, and in a dry run."""
    name = cloud.text(command_lines.read(f"{pod.url}/current")).strip()
    if not name:
        return None
    record = json.loads(cloud(command_lines.read(f"{pod.url}/jobs/{name}/job.json")))
    return Job(record["name"], tuple(record["command"]), record["keep"], record["output"])


def exit_codes(cloud: Gcloud, pod: Pod, job: Job, attempt: int) -> list[int]:
    """Of the workers that have ended, in this incarnation of the pod."""
    return [int(code) for code in cloud.text(command_lines.read(f"{job.url(pod)}/exits/{attempt}/*")).split()]


def newest_attempt(cloud: Gcloud, pod: Pod, job: Job | None, now: Request | None) -> int:
    """The pod's incarnation: the present one, or the last that left a log; 0 where none did."""
    if now is not None:
        return now.attempt
    if job is None:
        return 0
    logs = cloud.text(command_lines.listing(f"{job.url(pod)}/logs/")).split()
    return max((int(url.rstrip("/").rpartition("/")[2]) for url in logs), default=0)


def ended(cloud: Gcloud, pod: Pod, job: Job, attempt: int, workers: int, preempted: bool) -> bool:
    """Whether all `workers` that there still are ended by themselves, well or badly, none preempted or stopped."""
    codes = exit_codes(cloud, pod, job, attempt)
    if preempted and any(codes):
        return False  # its end may be that of a worker whose peers were gone
    return bool(codes) and len(codes) >= workers and SAVED_AND_STOPPED not in codes


def choose(wanted: Job | None, last: Job | None, last_ended: bool, now: Request | None) -> Job:
    """The job to follow: the last one where it goes on, or the wanted one. Raises `UserError` for two at once."""
    going_on = last if last is not None and not last_ended else None
    if wanted is None:
        if going_on is None:
            raise UserError("no job to go on with: tpu/pod run COMMAND …")
        return going_on
    if going_on is not None and going_on.command == wanted.command:
        return going_on
    if going_on is not None and now is not None and now.active:
        raise UserError(
            f"another job is running: {shlex.join(going_on.command)}\n"
            "give tpu/pod run without a command to follow it, or tpu/pod delete to end it"
        )
    return wanted
