"""What there is of a pod: its state, the last line of every worker, the newest checkpoint."""

import re

from tpu import command_lines, job, request
from tpu.gcloud import Gcloud, shown
from tpu.settings import Pod


def status(cloud: Gcloud, pod: Pod) -> None:
    """Says it all."""
    now = request.look(cloud, pod)
    if cloud.dry_run:
        pass
    elif now is None:
        cloud.say(f"{pod.name}: there is none; nothing is billed")
    else:
        cloud.say(f"{pod.name}: {now.state}, attempt {now.attempt}, {pod.price}{_why(now)}")
        cloud.say(f"  delete it: {shown(command_lines.delete(pod))}")
    working = job.current(cloud, pod)
    if working is None:
        if not cloud.dry_run:
            cloud.say("no job")
        return
    cloud.say(f"job {working.name}: {' '.join(working.command)}")
    attempt = job.newest_attempt(cloud, pod, working, now)
    for url in _list(cloud, f"{working.url(pod)}/logs/{attempt}/*"):
        worker = url.rpartition("/")[2].removesuffix(".log")
        lines = cloud.text(command_lines.read_from(url, -2000)).splitlines()
        cloud.say(f"  {worker}: {lines[-1] if lines else '(nothing yet)'}")
    codes = job.exit_codes(cloud, pod, working, attempt)
    if codes:
        cloud.say(f"  ended: {len(codes)} workers, exit codes {', '.join(map(str, sorted(set(codes))))}")
    if working.output:
        cloud.say(f"  newest checkpoint: {newest_checkpoint(cloud, working.output)}")


def _why(now: request.Request) -> str:
    return f": {now.detail}" if now.detail else ""


def _list(cloud: Gcloud, url: str) -> list[str]:
    return cloud.text(command_lines.listing(url)).split()


def newest_checkpoint(cloud: Gcloud, output: str) -> str:
    """By its manifest: a directory without one is what a killed run left."""
    found = _list(cloud, f"{output.rstrip('/')}/checkpoints/*/manifest.json")
    steps = [int(match[1]) for url in found if (match := re.search(r"/(\d+)/manifest\.json$", url))]
    return f"step {max(steps):,} in {output}" if steps else f"none yet in {output}"


def logs(cloud: Gcloud, pod: Pod, worker: str) -> None:
    """All that a worker's log in the bucket says, of the newest attempt; `worker` as s0-w0."""
    working = job.current(cloud, pod)
    now = request.look(cloud, pod)
    if working is None:
        cloud.say("no job")
        return
    attempt = job.newest_attempt(cloud, pod, working, now)
    cloud.say(cloud.text(command_lines.read(f"{working.url(pod)}/logs/{attempt}/{worker}.log")) or "(nothing yet)")
