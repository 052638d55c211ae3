"""Checks of what a run reads and writes: its model on its mesh, the output directory, the disks."""

import contextlib
import shutil
import socket
import tempfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath

from derta_jax.config import RunConfig
from derta_jax.errors import RunFailed, UserError
from derta_jax.models.params import count_parameters
from derta_jax.models.sharding import check_mesh
from derta_jax.training.checkpoint import directory_of
from derta_jax.training.mesh import make_mesh
from derta_jax.training.pod import processes
from derta_jax.training.pod.check import Check, Status, in_time, readable_size
from derta_jax.training.program import abstract_trainable
from derta_jax.training.restore import find_model

STORAGE_SECONDS = 60.0
SEEN_WITHIN = 3.0
"""Seconds until a file of another machine shows in a network file system."""
TEMPORARY_BYTES = 2**30


def check_model(config: RunConfig) -> tuple[list[Check], int | None]:
    """Whether the model can be read and the mesh fits it; the bytes of a checkpoint if so."""
    checks = []
    checkpoint = None
    name = "model"
    try:
        model = find_model(config.model.path).config
        checks.append(Check("model", "ok", f"{model.model_type}, {count_parameters(model):,} parameters"))
        name = "mesh"
        mesh = make_mesh(config.mesh)
        check_mesh(model, mesh)
        checks.append(Check("mesh", "ok", " × ".join(f"{axis} {size}" for axis, size in mesh.shape.items())))
        trained = sum(leaf.size for leaf in jax.tree.leaves(abstract_trainable(config, model, mesh)))
        checkpoint = trained * (4 + 2 * jnp.dtype(config.train.optimizer_dtype).itemsize)
    except UserError as error:
        checks.append(Check(name, "fail", str(error)))
    verdicts = processes.gather("doctor: model", checks)
    worst = next((checks for checks in verdicts if checks[-1][1] == "fail"), verdicts[0])
    return [Check(*check) for check in worst], checkpoint


def check_output(output: str, timeout: float) -> Check:
    """Whether all processes can write, read and delete in one and the same directory."""
    name = f".derta-check-{uuid.uuid4().hex[:8]}"
    with contextlib.ExitStack() as stack:
        problem = "" if processes.index() else _tried(lambda: stack.callback(_create(output, name)))
        problem, name = processes.gather("doctor: output of the first", [problem, name], timeout + STORAGE_SECONDS)[0]
        if problem:
            return Check("output", "fail", f"{output}: {problem}")
        problem = _tried(lambda: _meet_in(output, name)) if processes.index() else ""
        problems = processes.gather("doctor: output", problem, timeout + STORAGE_SECONDS)
    for process, problem in enumerate(problems):
        if problem:
            return Check("output", "fail", f"{output}, process {process}: {problem}")
    return Check("output", "ok", f"{output} can be written" + (" and is shared" if len(problems) > 1 else ""))


def _create(output: str, name: str) -> Callable[[], None]:
    """Leave a file in the directory, made for it where it is not there yet; returns how to undo it all."""
    place = directory_of(output)
    made = [] if "://" in output else [folder for folder in (place, *place.parents) if not folder.exists()]

    def undo() -> None:
        with contextlib.suppress(Exception):
            (place / name).unlink(missing_ok=True)
            for folder in made:
                folder.rmdir()

    try:
        if made:
            place.mkdir(parents=True, exist_ok=True)
        _write(place / name, name)
    except BaseException:
        undo()
        raise
    return undo


def _meet_in(output: str, name: str) -> None:
    """Find the file of process 0, and write one as well."""
    place = directory_of(output)
    deadline = time.monotonic() + SEEN_WITHIN
    while not (place / name).exists():
        if time.monotonic() > deadline:
            raise UserError(
                "a file that process 0 wrote is not there: train.output must be shared by all hosts, as a gs:// bucket "
                f"or a network file system is (here it is {place} on {socket.gethostname()})"
            )
        time.sleep(0.1)
    mine = place / f"{name}-{processes.index()}"
    try:
        _write(mine, name)
    finally:
        mine.unlink(missing_ok=True)


def _write(file: epath.Path, text: str) -> None:
    file.write_text(text)
    if (found := file.read_text()) != text:
        raise UserError(f"what was written to {file} reads as {found!r}")


def _tried(work: Callable[[], Any]) -> str:
    """Why it did not work, or nothing.

    Clients of buckets raise exceptions that share no class but `Exception`, and retry for minutes; whatever it is, the
    user must read it as the finding of this check, and the other processes wait for the answer.
    """
    try:
        in_time(work, STORAGE_SECONDS, f"no answer within {STORAGE_SECONDS:g} s")
    except (UserError, RunFailed) as error:
        return str(error)
    except Exception as error:  # whatever the storage raises is what the check has found
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return ""


def free_space(output: str) -> dict[str, int | None]:
    """Bytes free where runs and temporary files go, and those that checkpoints already take; None in a bucket."""
    temporary = shutil.disk_usage(tempfile.gettempdir()).free
    facts: dict[str, int | None] = {"temporary": temporary, "output": None, "used": 0}
    if "://" not in output:
        place = Path(output).absolute()
        there = next(folder for folder in (place, *place.parents) if folder.is_dir())
        with contextlib.suppress(OSError):
            facts["output"] = shutil.disk_usage(there).free
            facts["used"] = sum(file.stat().st_size for file in (place / "checkpoints").rglob("*") if file.is_file())
    return facts


def check_disk(config: RunConfig, checkpoint: int | None, facts: list[dict[str, Any]]) -> Check:
    """`checkpoint` is the bytes of one, if the model could be read."""
    small = min(range(len(facts)), key=lambda process: facts[process]["temporary"])
    temporary = facts[small]["temporary"]
    texts = [f"{readable_size(temporary)} free for temporary files"]
    status: Status = "ok"
    if temporary < TEMPORARY_BYTES:
        status = "warn"
        texts = [f"{texts[0]} on process {small}: free some, or set TMPDIR"]
    free, used = facts[0]["output"], facts[0]["used"]
    if free is not None:
        texts.insert(0, f"{readable_size(free)} free in {config.train.output}")
    if free is not None and checkpoint is not None:
        kept = config.checkpoint.keep + config.checkpoint.keep_best
        texts[0] += f", {kept + 1} checkpoints of {readable_size(checkpoint)} are kept"
        if free + used < (kept + 1) * checkpoint:
            status = "fail" if free < checkpoint else "warn"
            texts[0] += ": free some, lower checkpoint.keep or choose another train.output"
    return Check("disk", status, "; ".join(texts))
