"""Kill a training pod at random, again and again, start it again each time, and compare what comes out.

    python -m tests.endurance.kills --kills 50 --directory kills

Two processes of two devices each train a tiny model. Kills are `kill -9` of one process or of both, or SIGTERM to one,
while data is prepared, while steps are made, or while a checkpoint is written. After each the same command is started
again and nothing else is done. In the end the parameters must be, bit for bit, those of a run that nobody killed.
Takes about fifteen seconds a kill on two cores.
"""

import argparse
import dataclasses
import json
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import yaml

from tests.conftest import helpful, triple, write_jsonl, write_tiny_model
from tests.training.pod.start import end_pod, run_pod, start_pod

MOMENTS = ("preparing", "training", "saving")
SIGNALS = {"kill -9 one": signal.SIGKILL, "kill -9 both": signal.SIGKILL, "SIGTERM one": signal.SIGTERM}
PATIENCE = 300.0


DIGEST = """
import hashlib, pathlib, sys, jax, numpy
from orbax.checkpoint import v1 as ocp

whole = [path for path in pathlib.Path(sys.argv[1]).iterdir() if (path / "manifest.json").exists()]
newest = max(whole, key=lambda path: int(path.name))
here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
saved = ocp.checkpointables_metadata(newest).metadata
abstract = {
    name: jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), saved[name])
    for name in ("params", "optimizer")
}
digest = hashlib.sha256(newest.name.encode())
for path, leaf in jax.tree_util.tree_leaves_with_path(ocp.load_checkpointables(newest, abstract)):
    digest.update(jax.tree_util.keystr(path).encode() + numpy.asarray(leaf).tobytes())
print(digest.hexdigest())
"""


@dataclasses.dataclass
class Kill:
    """What was done to a run at which step, and what its processes did then."""

    moment: str
    kind: str
    step: int
    exit_codes: list[int]
    seconds_to_end: float


def main() -> int:
    """Exit code 0 when nothing was lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--steps", type=int, default=300, help="of a run; when one ends, the next is started")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--directory", type=Path, default=Path("kills"))
    args = parser.parse_args()
    directory = args.directory.absolute()
    directory.mkdir(parents=True)
    write_tiny_model(directory / "model")
    rows = write_jsonl(directory / "rows.jsonl", [triple(i) for i in range(500)] + [helpful(i) for i in range(1000)])

    command = write_config(directory, "whole", args.steps)
    subprocess.run(prepare_command(rows, directory / "whole-data"), check=True)
    assert run_pod(command, directory / "whole-logs", devices=2) == [0, 0]
    expected = digest_parameters(directory / "whole")

    chance = random.Random(args.seed)
    kills: list[Kill] = []
    repeated = runs = 0
    while len(kills) < args.kills:
        name = f"run-{runs}"
        kills += kill_prepare(prepare_command(rows, directory / f"{name}-data"), chance, args.kills - len(kills))
        command = write_config(directory, name, args.steps)
        kills += kill_training(command, directory / name, chance, args.kills - len(kills))
        repeated += json.loads((directory / name / "summary.json").read_text())["goodput"]["steps_repeated"]
        same = digest_parameters(directory / name) == expected
        print(
            f"{name}: parameters {'identical to those of the run nobody killed' if same else 'DIFFERENT'}", flush=True
        )
        if not same:
            return 1
        runs += 1
    report(kills, runs, repeated)
    return 0


def write_config(directory: Path, name: str, steps: int) -> list[str]:
    """The command that trains under that name."""
    config = {
        "model": {"path": str(directory / "model")},
        "data": {"path": str(directory / f"{name}-data")},
        "train": {
            "output": str(directory / name),
            "steps": steps,
            "batch_size": 8,
            "sequence_length": 96,
            "dtype": "float32",
            "remat": "none",
            "learning_rate": 1e-3,
            "compilation_cache": str(directory / "cache"),
        },
        "objective": {"sorry_keep_rate": 0.3},
        "checkpoint": {"every_steps": 7, "every_minutes": None},
        "processes": {"start_timeout": 20.0, "heartbeat_timeout": 5.0},
    }
    file = directory / f"{name}.yaml"
    file.write_text(yaml.safe_dump(config))
    return ["train", str(file)]


def prepare_command(rows: Path, output: Path) -> list[str]:
    """The command that prepares the data."""
    return [sys.executable, "-m", "derta_jax.cli", "prepare", str(rows), "--output", str(output)]


def kill_prepare(command: list[str], chance: random.Random, most: int) -> list[Kill]:
    """Prepare data, killing it at random moments until it is through."""
    kills: list[Kill] = []
    while True:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        delay = chance.uniform(0.5, 8.0) if len(kills) < most else PATIENCE
        try:
            code = process.wait(delay)
            assert code == 0, f"preparing ended with {code}"
            return kills
        except subprocess.TimeoutExpired:
            process.kill()
            kills.append(said(Kill("preparing", "kill -9 one", 0, [process.wait()], 0.0)))


def kill_training(command: list[str], output: Path, chance: random.Random, most: int) -> list[Kill]:
    """Train to the end, killing it at random moments."""
    kills: list[Kill] = []
    while True:
        pod = start_pod(command, output.with_name(f"{output.name}-logs"), devices=2)
        kill = kill_pod(pod, output, chance) if len(kills) < most else None
        if kill is None:
            codes = end_pod(pod, PATIENCE)
            assert codes == [0, 0], f"{output.name} was left alone and ended with {codes}"
            return kills
        kills.append(said(kill))


def kill_pod(pod: list[subprocess.Popen], output: Path, chance: random.Random) -> Kill | None:
    """One kill; None if the run ended before its moment came."""
    moment, kind = chance.choice(MOMENTS), chance.choice(tuple(SIGNALS))
    before, after = last_step(output), chance.randrange(1, 16)
    wait = chance.uniform(0.5, 6.0)
    started = time.monotonic()
    while True:
        ended = {process.poll() for process in pod}
        if 0 in ended and ended <= {0, None}:
            return None
        assert ended == {None}, f"a process ended by itself: {ended}"
        trained = last_step(output) >= before + after
        if (
            (moment == "preparing" and time.monotonic() - started > wait)
            or (moment == "training" and trained)
            or (moment == "saving" and trained and is_saving(output))
        ):
            break
        time.sleep(0.002)
    victims = pod if kind == "kill -9 both" else [chance.choice(pod)]
    for process in victims:
        process.send_signal(SIGNALS[kind])
    killed = time.monotonic()
    codes = end_pod(pod, PATIENCE)
    return Kill(moment, kind, last_step(output), codes, time.monotonic() - killed)


def last_step(output: Path) -> int:
    """The newest step that the metrics speak of."""
    file = output / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.is_file() else []
    whole = [line for line in lines if line.endswith("\n")]
    return json.loads(whole[-1])["step"] if whole else 0


def is_saving(output: Path) -> bool:
    """Whether a checkpoint is there that has no manifest yet."""
    directories = list((output / "checkpoints").glob("*"))
    return any(not (directory / "manifest.json").exists() for directory in directories)


def digest_parameters(output: Path) -> str:
    """Of all parameters and the optimizer's state in a run's newest checkpoint, bit for bit."""
    command = [sys.executable, "-W", "ignore", "-c", DIGEST, str(output / "checkpoints")]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def said(kill: Kill) -> Kill:
    print(
        f"{kill.moment:<10} {kill.kind:<13} step {kill.step:>4}  exit codes {kill.exit_codes}, the last process ended "
        f"after {kill.seconds_to_end:.1f} s",
        flush=True,
    )
    return kill


def report(kills: list[Kill], runs: int, repeated: int) -> None:
    """The figures of all kills."""
    print(f"\n{len(kills)} kills in {runs} runs; {repeated} steps were done again; nothing was lost")
    for (moment, kind), count in sorted(Counter((kill.moment, kill.kind) for kill in kills).items()):
        print(f"  {count:>3} × {kind} while {moment}")
    noticed = [kill.seconds_to_end for kill in kills if kill.kind == "kill -9 one" and len(kill.exit_codes) > 1]
    if noticed:
        print(
            f"a dead process was noticed, and the other ended, within {np.median(noticed):.1f} s (median), "
            f"{max(noticed):.1f} s (longest)"
        )


if __name__ == "__main__":
    sys.exit(main())
