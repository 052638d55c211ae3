"""`tpu/pod`: parse, read the settings, call one function; what is left behind is always said."""

import argparse
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from derta_jax.errors import RunFailed, StoppedEarly, UserError
from tpu import command_lines, job, request, setup, status
from tpu.gcloud import CannotLook, Gcloud, shown
from tpu.run import see_through
from tpu.settings import Pod, read_env

EXIT_CODES = {UserError: 2, RunFailed: 1, StoppedEarly: job.SAVED_AND_STOPPED}

DESCRIPTION = """\
Pods for training on TPU, from asking for one to deleting it, by gcloud. Every command may be given again: what is there
stays, nothing is asked for twice. --dry-run prints the exact command lines and runs none.

  tpu/pod run derta train configs/llama3_8b_full.yaml model.path=gs://… data.path=data/mine train.output=gs://…

asks for a pod where there is none, installs this checkout on it, starts the job on every worker, shows its log, asks
for another pod when this one is preempted, and deletes it at the end. Settings: tpu/env.example. See docs/pods.md.
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tpu/pod",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--env", type=Path, default=Path(__file__).parent / "env", metavar="FILE", help="default: tpu/env"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the command lines, run nothing")
    parser.add_argument("--every", type=float, default=30.0, metavar="SECONDS", help="how often to look (default: 30)")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Callable[..., None], says: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=says, description=says, allow_abbrev=False)
        sub.set_defaults(run=run)
        return sub

    command("create", _create, "ask for the pod and wait until it is there")
    fit = command("setup", _setup, "install this checkout on every worker; deletes the pod where that fails")
    fit.add_argument("--keep", action="store_true", help="a pod on which it fails stays")
    run = command("run", _run, "run a command on every worker, to its end; without one, go on following the last")
    run.add_argument("--keep", action="store_true", help="the pod stays when the job has ended")
    run.add_argument("--detach", action="store_true", help="start and leave; the pod deletes itself at the end")
    run.add_argument("--with", dest="more", action="append", default=[], metavar="PATH", help="take this along as well")
    run.add_argument("job", nargs=argparse.REMAINDER, metavar="COMMAND …", help="files that it names are taken along")
    logs = command("logs", _logs, "what a worker has printed so far")
    logs.add_argument("--worker", default="s0-w0", metavar="sN-wM", help="slice and worker (default: s0-w0)")
    command("status", _status, "state and price, the last line of every worker, the newest checkpoint")
    ssh = command("ssh", _ssh, "a shell on a worker, or a command on it")
    ssh.add_argument("--worker", default="0", metavar="M|all", help="default: 0")
    ssh.add_argument("--slice", type=int, default=0, metavar="N", help="of several (default: 0)")
    ssh.add_argument("remote", nargs=argparse.REMAINDER, metavar="COMMAND …")
    command("delete", _delete, "delete the pod and see that it is gone")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code, which are those of `derta`."""
    args = _parser().parse_args(argv)
    for stop in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(stop, _interrupt)
    pod: Pod | None = None
    try:
        pod = read_env(args.env)
        args.run(Gcloud(_say, args.dry_run, args.every), pod, args)
    except tuple(EXIT_CODES) as error:
        print(f"tpu/pod {args.command}: {error}", file=sys.stderr)
        if isinstance(error, CannotLook) and pod is not None:
            print(_left_behind(pod), file=sys.stderr)
        return next(code for kind, code in EXIT_CODES.items() if isinstance(error, kind))
    except KeyboardInterrupt:
        if pod is not None:
            print(_left_behind(pod), file=sys.stderr)
        return 128 + signal.SIGINT
    return 0


def _interrupt(signum: int, frame: object) -> None:
    raise KeyboardInterrupt


def _say(line: str) -> None:
    print(line, flush=True)


def _left_behind(pod: Pod) -> str:
    return (
        f"\n{pod.name} is left as it is: it may be there or be waited for, at {pod.price}.\n"
        f"Look:       tpu/pod status\nGo on:      the same command again\n"
        f"Delete it:  {shown(command_lines.delete(pod))}"
    )


def _create(cloud: Gcloud, pod: Pod, args: argparse.Namespace) -> None:
    request.create(cloud, pod)


def _setup(cloud: Gcloud, pod: Pod, args: argparse.Namespace) -> None:
    with request.torn_down(cloud, pod, keep=args.keep, at_the_end=False):
        setup.publish(cloud, pod)
        setup.install(cloud, pod)


def _run(cloud: Gcloud, pod: Pod, args: argparse.Namespace) -> None:
    command = _after_dashes(args.job)
    wanted = job.make_job(command, args.keep) if command else None
    files = job.files_of(command, args.more)
    now = request.look(cloud, pod)
    last = job.current(cloud, pod)
    attempt = job.newest_attempt(cloud, pod, last, now)
    workers = request.count_workers(cloud, pod) if now and now.active else 0
    over = last is not None and job.ended(cloud, pod, last, attempt, workers, now is not None and now.over)
    working = job.choose(wanted, last, over, now)
    if working is wanted:
        job.put(cloud, pod, working, files)
    with request.torn_down(cloud, pod, keep=working.keep, at_the_end=not args.detach):
        see_through(cloud, pod, working, now, attempt, detach=args.detach)


def _after_dashes(words: list[str]) -> list[str]:
    return words[1:] if words[:1] == ["--"] else words


def _logs(cloud: Gcloud, pod: Pod, args: argparse.Namespace) -> None:
    status.logs(cloud, pod, args.worker)


def _status(cloud: Gcloud, pod: Pod, args: argparse.Namespace) -> None:
    status.status(cloud, pod)


def _ssh(cloud: Gcloud, pod: Pod, args: argparse.Namespace) -> None:
    if not 0 <= args.slice < pod.slice.count:
        raise UserError(f"--slice {args.slice}: {pod.name} has slices 0 to {pod.slice.count - 1}")
    remote = " ".join(_after_dashes(args.remote))
    cloud.attached(command_lines.ssh(pod, pod.nodes[args.slice], args.worker, remote or None))


def _delete(cloud: Gcloud, pod: Pod, args: argparse.Namespace) -> None:
    request.delete(cloud, pod)
