"""This checkout on every worker: a wheel built here, put into the bucket, installed with the same constraints."""

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from derta_jax import __version__
from derta_jax.errors import RunFailed
from tpu import command_lines
from tpu.gcloud import Absent, Gcloud
from tpu.settings import Pod

ROOT = Path(__file__).parents[1]

FETCH = (
    "curl --silent --fail --header 'Metadata-Flavor: Google'"
    " http://metadata.google.internal/computeMetadata/v1/instance/attributes/startup-script"
)
"""Prints the script that the pod was created with, on any of its workers."""


def on_all_workers(cloud: Gcloud, pod: Pod, action: str, tries: int = 1) -> None:
    """Run one action of worker.sh on every worker of every slice at once. Raises `RunFailed`."""
    command = f"{FETCH} | sudo bash -s -- {action}"

    def on_one(node: str) -> str:
        return _persistently(cloud, command_lines.ssh(pod, node, "all", command), tries)

    with ThreadPoolExecutor(len(pod.nodes)) as pool:
        for node, said in zip(pod.nodes, pool.map(on_one, pod.nodes), strict=True):
            for line in said.splitlines():
                cloud.say(f"  {node}: {line}")


def _persistently(cloud: Gcloud, words: tuple[str, ...], tries: int) -> str:
    while True:
        try:
            return cloud(words)
        except Absent:
            raise
        except RunFailed:
            tries -= 1
            if tries <= 0:
                raise
            time.sleep(cloud.every)


def warm_up(cloud: Gcloud, pod: Pod) -> None:
    """One connection to each slice, which makes and spreads the ssh key: many at once would race to do so.

    Workers take a while after the pod is ACTIVE until they answer.
    """
    for node in pod.nodes:
        _persistently(cloud, command_lines.ssh(pod, node, "0", "true"), tries=10)


@contextmanager
def built_wheel(cloud: Gcloud) -> Iterator[Path]:
    """The wheel of this checkout, in a directory that goes away; in a dry run only its name."""
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, str(ROOT)]
        if cloud.dry_run:
            cloud.say("python -m pip wheel --no-deps --wheel-dir dist .")
            yield Path(f"dist/derta_jax-{__version__}-py3-none-any.whl")
            return
        done = subprocess.run(words, capture_output=True, text=True)
        if done.returncode:
            raise RunFailed(f"the wheel could not be built:\n{done.stderr.strip()}")
        (wheel,) = Path(folder).glob("*.whl")
        yield wheel


def publish(cloud: Gcloud, pod: Pod) -> None:
    """Build the wheel and put it and its constraints where workers look for them. Raises `RunFailed`."""
    with built_wheel(cloud) as wheel:
        cloud(command_lines.upload(wheel, f"{pod.url}/dist/{wheel.name}"))
    cloud(command_lines.upload(ROOT / "constraints.txt", f"{pod.url}/dist/constraints.txt"))


def install(cloud: Gcloud, pod: Pod) -> None:
    """On every worker; what is installed already stays. Raises `RunFailed`."""
    warm_up(cloud, pod)
    on_all_workers(cloud, pod, "setup")
