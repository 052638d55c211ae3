"""A cloud in a directory: stands in for `gcloud` on the user's machine, and for what worker.sh calls on a TPU VM.

    stand_in.py gcloud|curl|sudo|systemd-run|systemctl|python3 ARGUMENTS

`$CLOUD` holds `bucket/` (objects as files), `calls.jsonl` (every `gcloud` command line), `scenario.json` and, while
there is a pod, `request.json` and `vms/NODE-wM/` with the metadata and the processes of each worker. A request goes
through the scenario's states, one each time that it is looked at; when it is ACTIVE its workers boot, which means that
they run the real worker.sh. Flags are checked against those of the real SDK (`flags.json`).
"""

import fcntl
import fnmatch
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

CLOUD = Path(os.environ["CLOUD"])
REQUEST, BUCKET, VMS = CLOUD / "request.json", CLOUD / "bucket", CLOUD / "vms"
FLAGS = json.loads((Path(__file__).parent / "flags.json").read_text(encoding="utf-8"))["commands"]
SCENARIO = json.loads((CLOUD / "scenario.json").read_text(encoding="utf-8"))


def fail(message: str) -> NoReturn:
    """As `gcloud` does."""
    print(f"ERROR: {message}", file=sys.stderr)
    sys.exit(1)


def parse(words: list[str]) -> tuple[str, list[str], dict[str, str]]:
    """Command, positionals and flags; what the real `gcloud` would not take is an error."""
    command = next((name for name in FLAGS if words[: len(name.split())] == name.split()), "")
    if not command:
        fail(f"Invalid choice: {shlex.join(words)}")
    rest, positionals = words[len(command.split()) :], []
    flags: dict[str, str] = {}
    while rest:
        word = rest.pop(0)
        if word == "-" or not word.startswith("-"):
            positionals.append(word)
            continue
        flag, equals, value = word.partition("=")
        if flag not in FLAGS[command]:
            fail(f"unrecognized arguments: {flag}")
        if FLAGS[command][flag] and not equals:
            if not rest or rest[0].startswith("--"):
                fail(f"argument {flag}: expected one argument")
            value = rest.pop(0)
        if not FLAGS[command][flag] and equals:
            fail(f"argument {flag}: ignored explicit argument {value!r}")
        flags[flag] = f"{flags[flag]},{value}" if flag in flags else value
    return command, positionals, flags


def local(url: str) -> Path:
    """Where an object lies."""
    if not url.startswith("gs://my-bucket/"):
        fail(f"{url} is not in the bucket")
    return BUCKET / url.removeprefix("gs://")


def matching(url: str) -> list[Path]:
    """The objects that a URL with or without `*` names."""
    if "*" not in url:
        return [path] if (path := local(url)).is_file() else []
    pattern = str(local(url))
    depth = pattern.count("/")
    return sorted(
        path
        for path in BUCKET.rglob("*")
        if path.is_file() and str(path).count("/") == depth and fnmatch.fnmatch(str(path), pattern)
    )


def storage(command: str, words: list[str], flags: dict[str, str]) -> None:
    """cp, cat, ls, rm."""
    if command == "cp":
        *sources, target = words
        for source in sources:
            if target.startswith("gs://"):
                path = local(target)
                path.parent.mkdir(parents=True, exist_ok=True)
                whole = CLOUD / f"upload-{os.getpid()}"
                whole.write_bytes(sys.stdin.buffer.read() if source == "-" else Path(source).read_bytes())
                whole.replace(path)
            else:
                if not (found := matching(source)):
                    fail(f"The following URLs matched no objects or files:\n{source}")
                for path in found:
                    (Path(target) / path.name).write_bytes(path.read_bytes())
        return
    if command == "ls":
        url = words[0]
        folder = local(url) if url.endswith("/") else None
        found = sorted(folder.iterdir()) if folder and folder.is_dir() else matching(url)
        shown = [
            f"gs://{path.relative_to(BUCKET)}{'/' if path.is_dir() else ''}" for path in found if path.name[0] != "."
        ]
        if not shown:
            fail("One or more URLs matched no objects.")
        print("\n".join(shown))
        return
    found = [path for url in words for path in matching(url)]
    if not found:
        fail("The following URLs matched no objects or files:\n" + "\n".join(words))
    for path in found:
        if command == "rm":
            path.unlink()
            continue
        start, dash, _ = flags.get("--range", "0-").rpartition("-") if "--range" in flags else ("0", "-", "")
        data = path.read_bytes()
        if start == "":
            data = data[int(flags["--range"]) :]
        elif int(start) >= len(data) > 0:
            fail("HTTPError 416: The requested range cannot be satisfied.")
        else:
            data = data[int(start) :]
        sys.stdout.buffer.write(data)


def load() -> dict[str, Any] | None:
    """The request there is."""
    return json.loads(REQUEST.read_text(encoding="utf-8")) if REQUEST.exists() else None


def save(request: dict[str, Any]) -> None:
    """Keep it."""
    REQUEST.write_text(json.dumps(request), encoding="utf-8")


def create(name: str, flags: dict[str, str]) -> None:
    """The request joins the queue."""
    if load():
        fail(f"ALREADY_EXISTS: Resource {name!r} already exists")
    if refusal := SCENARIO.get("refuse_create"):
        fail(refusal)
    if ("--node-id" in flags) == ("--node-count" in flags):
        fail("Exactly one of (--node-id | --node-count : --node-prefix) must be specified.")
    for needed in ("--zone", "--accelerator-type", "--runtime-version"):
        if needed not in flags:
            fail(f"argument {needed}: Must be specified.")
    metadata = dict(pair.split("=", 1) for pair in flags["--metadata"].split(","))
    for pair in flags["--metadata-from-file"].split(","):
        key, path = pair.split("=", 1)
        metadata[key] = Path(path).read_text(encoding="utf-8")
    count = int(flags.get("--node-count", 0))
    nodes = [f"{flags['--node-prefix']}-{i}" for i in range(count)] if count else [flags["--node-id"]]
    made = CLOUD / "made"
    number = int(made.read_text()) if made.exists() else 0
    made.write_text(str(number + 1))
    plans = SCENARIO["requests"]
    save({"name": name, "nodes": nodes, "metadata": metadata, "plan": plans[min(number, len(plans) - 1)], "looked": 0})


def state_of(request: dict[str, Any]) -> str:
    """Where the request stands after it has been looked at once more; boots and kills its workers."""
    plan = request["plan"]
    if request.get("lost"):
        return "SUSPENDED"
    state = plan["states"][min(request["looked"], len(plan["states"]) - 1)]
    request["looked"] += 1
    if state == "ACTIVE" and not request.get("booted"):
        boot(request)
        request["booted"] = True
    if "preempt_when" in plan and matching(plan["preempt_when"]) and request.get("booted"):
        kill_workers()
        request["lost"] = True
        state = plan.get("preempted_state", "SUSPENDED")
    save(request)
    return state


def boot(request: dict[str, Any]) -> None:
    """Every worker of every slice runs its startup script."""
    workers = SCENARIO.get("workers", 2)
    for slice_number, node in enumerate(request["nodes"]):
        for worker in range(workers):
            vm = VMS / f"{node}-w{worker}"
            (vm / "metadata").mkdir(parents=True)
            several = f"MEGASCALE_SLICE_ID: '{slice_number}'\n" if len(request["nodes"]) > 1 else ""
            attributes = {
                **request["metadata"],
                "agent-worker-number": str(worker),
                "worker-network-endpoints": ",".join(f"x:y:10.0.{slice_number}.{i}" for i in range(workers)),
                "tpu-env": f"NODE_ID: '{node}'\nWORKER_ID: '{worker}'\n{several}",
            }
            for key, value in attributes.items():
                (vm / "metadata" / key).write_text(value, encoding="utf-8")
            start_on(vm, ["bash", str(CLOUD / "vms" / vm.name / "metadata" / "startup-script")], "boot")


def start_on(vm: Path, words: list[str], unit: str) -> None:
    """A process of its own on a worker."""
    with (vm / f"{unit}.out").open("ab") as out:
        process = subprocess.Popen(
            words, env=vm_environment(vm), stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
        )
    units = vm / "units"
    units.mkdir(exist_ok=True)
    (units / unit).write_text(str(process.pid))


def vm_environment(vm: Path) -> dict[str, str]:
    """What a worker's processes see."""
    return {**os.environ, "VM": str(vm), "DERTA_ROOT": str(vm / "root"), "DERTA_PAUSE": "0.1", "HOME": str(vm)}


def alive(pid: int) -> bool:
    """Not gone, and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def signal_group(unit: Path, number: signal.Signals) -> None:
    """To a unit's process and all that it started."""
    pid = int(unit.read_text())
    if alive(pid):
        os.killpg(pid, number)


def kill_workers(directory: Path = VMS) -> None:
    """SIGTERM to jobs, as a machine that is about to go sends it, then the end of everything; the disks go too."""
    for path in directory.glob("*/units/derta-job"):
        signal_group(path, signal.SIGTERM)
    time.sleep(0.3)
    for _ in range(3):  # one that is about to end may have started another
        for path in directory.glob("*/units/*"):
            signal_group(path, signal.SIGKILL)
        time.sleep(0.05)
    if directory.exists():
        directory.rename(CLOUD / f"gone-{time.time_ns()}")


def queued(command: str, words: list[str], flags: dict[str, str]) -> None:
    """create, describe, delete."""
    if command == "create":
        create(words[0], flags)
        return
    request = load()
    if request is None or request["name"] != words[0]:
        fail(f"NOT_FOUND: Resource 'queuedResources/{words[0]}' was not found.")
    if command == "delete":
        if "--force" not in flags:
            fail("FAILED_PRECONDITION: the queued resource has nodes")
        REQUEST.unlink()
        if "VM" in os.environ:
            # a worker that deletes its own pod must get its answer
            subprocess.Popen([sys.executable, __file__, "kill"], start_new_session=True)
        else:
            kill_workers()
        return
    state = state_of(request)
    nodes = [{"nodeId": node, "node": {"metadata": request["metadata"]}} for node in request["nodes"]]
    detail = {f"{state.lower()}Data": {"error": {"message": SCENARIO.get("why", "")}}}
    print(json.dumps({"name": words[0], "state": {"state": state, **detail}, "tpu": {"nodeSpec": nodes}}))


def tpu_vm(command: str, words: list[str], flags: dict[str, str]) -> None:
    """describe, ssh."""
    node = words[0]
    vms = sorted(VMS.glob(f"{node}-w*"))
    if not vms:
        fail(f"NOT_FOUND: Resource 'nodes/{node}' was not found.")
    if command == "describe":
        state = (load() or {}).get("plan", {}).get("node_state", "READY")
        print(json.dumps({"state": state, "networkEndpoints": [{"ipAddress": vm.name} for vm in vms]}))
        return
    if counted("connections") <= SCENARIO.get("ssh_failures", 0):
        fail("ssh: connect to host 10.0.0.1 port 22: Connection refused")
    if flags["--worker"] != "all":
        vms = [VMS / f"{node}-w{flags['--worker']}"]
    running = [subprocess.Popen(["bash", "-c", flags["--command"]], env=vm_environment(vm)) for vm in vms]
    if any([process.wait() for process in running]):
        fail("a command failed on a worker")


def counted(what: str) -> int:
    """How often this has been asked, this time included."""
    with (CLOUD / what).open("a") as times:
        times.write("x")
    return (CLOUD / what).stat().st_size


def gcloud(words: list[str]) -> None:
    """One command line."""
    command, positionals, flags = parse(words)
    with (CLOUD / "calls.jsonl").open("a", encoding="utf-8") as calls:
        calls.write(json.dumps({"words": words, "on_worker": "VM" in os.environ}) + "\n")
    room, name = command.rsplit(" ", 1)
    message, times = SCENARIO.get("describe_fails", ["", 0])
    if name == "describe" and "VM" not in os.environ and counted("unanswered") <= times:
        fail(message)
    if name in SCENARIO.get("hang", []) and "VM" not in os.environ:
        (CLOUD / "hanging").touch()
        time.sleep(60)
    if room == "storage":
        storage(name, positionals, flags)
    elif room.endswith("tpu-vm"):
        tpu_vm(name, positionals, flags)
    else:
        with (CLOUD / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            queued(name, positionals, flags)


def curl(words: list[str]) -> None:
    """A worker's metadata."""
    path = Path(os.environ["VM"]) / "metadata" / words[-1].rpartition("/")[2]
    if not path.exists():
        sys.exit(22)
    print(path.read_text(encoding="utf-8"), end="")


def systemd_run(words: list[str]) -> None:
    """A unit: at once, or after `--on-active`."""
    vm, unit, delay = Path(os.environ["VM"]), "", ""
    environment: list[str] = []
    while words[0].startswith("--"):
        option = words.pop(0)
        if option in ("--unit", "--on-active", "--setenv", "--property"):
            value = words.pop(0)
            unit = value if option == "--unit" else unit
            delay = value if option == "--on-active" else delay
            environment += [value] if option == "--setenv" else []
        elif option not in ("--quiet", "--collect"):
            sys.exit(f"systemd-run: unrecognized option {option!r}")
    pid = vm / "units" / unit
    if pid.exists() and alive(int(pid.read_text())):
        sys.exit(f"Failed to start transient service unit: Unit {unit}.service was already loaded")
    wait = f"sleep {delay.removesuffix('s')}; " if delay else ""
    start_on(vm, ["env", *environment, "bash", "-c", f"{wait}exec {shlex.join(words)}"], unit)


def systemctl(words: list[str]) -> None:
    """is-active."""
    pid = Path(os.environ["VM"]) / "units" / words[-1]
    sys.exit(0 if pid.exists() and alive(int(pid.read_text())) else 3)


def python3(words: list[str]) -> None:
    """Installation of uv, and by it of an environment in which `derta` only says its version."""
    vm = Path(os.environ["VM"])
    with (vm / "installed.jsonl").open("a", encoding="utf-8") as log:
        log.write(json.dumps(words) + "\n")
    if words[:3] == ["-m", "uv", "pip"] and SCENARIO.get("installation_fails"):
        sys.exit("no solution found")
    if words[:3] == ["-m", "uv", "venv"]:
        programs = Path(words[-1]) / "bin"
        programs.mkdir(parents=True)
        (programs / "derta").write_text("#!/bin/sh\necho derta 0.1.0\n")
        (programs / "derta").chmod(0o755)


if __name__ == "__main__":
    called, arguments = sys.argv[1], sys.argv[2:]
    if called == "sudo":
        os.execvp(arguments[0], arguments)
    elif called == "kill":
        time.sleep(0.2)
        kill_workers()
    else:
        known = {f.__name__.replace("_", "-"): f for f in (gcloud, curl, systemd_run, systemctl, python3)}
        known[called](arguments)
