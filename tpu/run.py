"""A job seen through: a pod for it, the job on every worker, its log, and another pod for each that is preempted."""

import itertools
import signal
import time

from derta_jax.errors import RunFailed, StoppedEarly
from tpu import command_lines, request, setup
from tpu.gcloud import Absent, CannotLook, Gcloud, shown
from tpu.job import SAVED_AND_STOPPED, Job, exit_codes
from tpu.request import Request
from tpu.settings import Pod

TOLD_TO_STOP = {0, SAVED_AND_STOPPED, 128 + signal.SIGTERM}
"""Exit codes of a job whose machine goes away, other than those of its own making."""


class _JobStopped(RunFailed):
    """The job was told to stop and has saved everything."""


def see_through(cloud: Gcloud, pod: Pod, job: Job, now: Request | None, attempt: int, *, detach: bool = False) -> None:
    """Run the job to its end on the pod that is there `now`, or on another one; `attempt` was the last there was.

    Raises `RunFailed` where a worker fails, the pod has lived its hours or was deleted, `StoppedEarly` after too many
    preemptions.
    """
    if now is None or now.over:
        # workers install and start by themselves when they boot: the wheel has to be there before
        setup.publish(cloud, pod)
    for tries in itertools.count():
        try:
            if now is None or now.over:
                attempt += 1
                _ask_again(cloud, pod, now, attempt)
            else:
                request.wait_until_active(cloud, pod)
            setup.on_all_workers(cloud, pod, "run", tries=3)
            if detach:
                cloud.say(f"{pod.name} deletes itself when the job has ended; follow it with: tpu/pod run")
            else:
                _follow(cloud, pod, job, attempt)
            return
        except CannotLook:
            raise
        except RunFailed as error:
            now = _look_again(cloud, pod, job, attempt, error)
        if now is None:
            return
        why = "stopped, everything saved" if now.active else "preempted"
        if tries == pod.max_tries:
            raise StoppedEarly(f"{why} {tries + 1} times (MAX_TRIES={tries}); run the same again to go on")
        cloud.say(f"{pod.name}: {why}; going on ({tries + 1} of {pod.max_tries})")


def _ask_again(cloud: Gcloud, pod: Pod, last: Request | None, attempt: int) -> None:
    if last is not None:
        request.delete(cloud, pod)
    request.ask_for(cloud, pod, attempt)
    request.wait_until_active(cloud, pod)
    setup.install(cloud, pod)


def _look_again(cloud: Gcloud, pod: Pod, job: Job, attempt: int, error: RunFailed) -> Request | None:
    """The request where the job may go on, None where it has ended well; else raises the error, or a better one."""
    time.sleep(cloud.every)  # a pod that is about to be preempted looks like a failed job for a moment
    now = request.look(cloud, pod)
    if now is not None:
        preempted = now.over and now.state != "FAILED"
        if preempted or isinstance(error, _JobStopped):
            return now
        raise error
    if cloud.text(command_lines.read(f"{pod.url}/expired/{attempt}")):
        raise RunFailed(f"{pod.name} has lived its {pod.max_hours:g} hours; run the same again to go on") from error
    codes = exit_codes(cloud, pod, job, attempt)
    if codes and not any(codes):
        cloud.say(f"job {job.name} is done, and the pod has deleted itself")
        return None
    taken_away = all(code in TOLD_TO_STOP for code in codes)
    if isinstance(error, Absent) or (codes and taken_away):
        how = "it was deleted by someone else" if taken_away else _failed(codes, _log(cloud, pod, job, attempt))
        raise RunFailed(f"{pod.name} is gone: {how}") from error
    raise error


def _failed(codes: list[int], log: "_Log") -> str:
    return f"the job failed (exit codes {', '.join(map(str, sorted(set(codes))))})\n{log.tail()}"


def _log(cloud: Gcloud, pod: Pod, job: Job, attempt: int) -> "_Log":
    return _Log(cloud, f"{job.url(pod)}/logs/{attempt}/s0-w0.log")


def _follow(cloud: Gcloud, pod: Pod, job: Job, attempt: int) -> None:
    """Show the log until all workers have ended well. Raises `RunFailed` when they have not, or the pod is lost."""
    log = _log(cloud, pod, job, attempt)
    workers = request.count_workers(cloud, pod)
    while True:
        now = request.look(cloud, pod)
        codes = exit_codes(cloud, pod, job, attempt)
        log.show()
        if cloud.dry_run:
            return
        if codes and len(codes) >= workers:
            if SAVED_AND_STOPPED in codes:
                raise _JobStopped(f"job {job.name} was told to stop")
            if any(codes):
                raise RunFailed(_failed(codes, log))
            cloud.say(f"job {job.name} is done")
            return
        if now is None or now.over:
            raise Absent(f"{pod.name} is gone")
        time.sleep(cloud.every)


class _Log:
    """What the first worker's log says that has not been shown."""

    def __init__(self, cloud: Gcloud, url: str) -> None:
        self.cloud, self.url, self.seen = cloud, url, 0

    def show(self) -> None:
        try:
            new = self.cloud.text(command_lines.read_from(self.url, self.seen))
        except RunFailed:
            return  # nothing beyond what was seen: the bucket answers a range past the end with an error
        whole = new[: new.rfind("\n") + 1]
        self.seen += len(whole.encode())
        for line in whole.splitlines():
            self.cloud.say(f"  {line}")

    def tail(self) -> str:
        """The last lines of it, and where those of all workers lie."""
        lines = self.cloud.text(command_lines.read_from(self.url, -4000)).splitlines()[-20:]
        everyone = shown(command_lines.read(self.url.replace("s0-w0", "*")))
        return "\n".join([*(f"  {line}" for line in lines), f"all of it: {everyone}"])
