"""Checkpoints of a run: written by orbax while training goes on, whole once their manifest is there, else not there.

`checkpoints/<step>/` comes into being in three acts: orbax commits it; every file is hashed; the manifest is written.
Only then are older ones deleted. A step without a manifest is what an interrupted run left behind: it counts for
nothing, and the next save or the next start removes it. Nothing is loaded before every file has been compared with the
manifest. On disk and in `gs://` buckets alike; where there are several processes, all must save and restore.
"""

import contextlib
import functools
import importlib.util
import json
import math
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from os import PathLike
from typing import Any

import fsspec
import jax
import numpy as np
from etils import epath
from orbax.checkpoint import v1 as ocp

from derta_jax.errors import UserError
from derta_jax.training.manifest import (
    MANIFEST,
    Damaged,
    Manifest,
    agree_on_manifest,
    check_files,
    digest_files,
    read_manifest,
    write_manifest,
)
from derta_jax.training.pod import processes
from derta_jax.training.step import TrainState

Identity = Mapping[str, Any]
"""What must be the same to go on training, as dotted keys: the architecture, the data's hash, the recipe, the seed …"""

CHUNK_BYTES = 2**26
STEP_DIRECTORY = re.compile(r"(\d+)(\.orbax-checkpoint-tmp.*)?")

# others write to a bucket, too: what was seen in a folder must not be remembered
fsspec.config.conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)


def directory_of(path: str | PathLike[str]) -> epath.Path:
    """An absolute path on disk, or one in a bucket. Raises `UserError` for what is neither."""
    place = str(path)
    if "://" not in place:
        return epath.Path(place).absolute()
    if not place.startswith("gs://"):
        raise UserError(f"runs are kept in a directory or in a gs:// bucket, not in {place}")
    if importlib.util.find_spec("gcsfs") is None:
        raise UserError(f"cannot reach {place} without gcsfs: pip install 'derta-jax[gcs]'")
    return epath.Path(place)


class Checkpoints:
    """The `checkpoints/` of a run; the newest `keep` stay (None: all), and the `keep_best` of lowest held-out loss.

    A context manager: leaving it waits for the last save. Whoever only reads says `keep=None`: no directory is made.
    """

    def __init__(self, directory: str | PathLike[str], keep: int | None = 2, keep_best: int = 0):
        self.directory = directory_of(directory)
        self.keep, self.keep_best = keep, keep_best
        if keep is not None:
            self.directory.mkdir(parents=True, exist_ok=True)
        self._background = ThreadPoolExecutor(1, thread_name_prefix="derta-checkpoints")
        self._saving: Future[None] | None = None
        self._checked: set[int] = set()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.wait()
        finally:
            self._background.shutdown()

    @property
    def steps(self) -> list[int]:
        """The whole ones, oldest first; that no file of theirs was damaged since is only known to `restore`."""
        return self._look()[0]

    @property
    def latest_step(self) -> int | None:
        return max(self.steps, default=None)

    def identity(self, step: int) -> Identity:
        with self._damage_as_user_error(step):
            return read_manifest(self._at(step)).identity

    def save(self, state: TrainState, identity: Identity, held_out_loss: float | None = None) -> None:
        """Start writing `state`; returns once it is copied off the devices.

        Raises `UserError` on a full disk, and whatever the save before this one ended with.
        """
        parts = {**state.trainable, "optimizer": state.opt_state}
        self.save_parts(int(state.step), parts, identity, held_out_loss)

    def save_parts(
        self, step: int, parts: Mapping[str, Any], identity: Identity, held_out_loss: float | None = None
    ) -> None:
        """Start writing trees of arrays under their names, as `save` does."""
        self.wait()
        processes.barrier("saving may begin")
        with _readable_errors(self.directory, step):
            processes.first_does("room for a checkpoint", lambda: self._make_room(step))
            self._check_space(parts, step)
            with _storage_options():
                response = ocp.save_checkpointables_async(self._at(step), dict(parts))
        loss = held_out_loss if held_out_loss is not None and math.isfinite(held_out_loss) else None
        self._saving = self._background.submit(self._finish, response, step, identity, loss)

    def wait(self) -> None:
        """Return when the last `save` is whole; its errors surface here."""
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.result()

    def restore_newest(self, abstract: TrainState, identity: Identity) -> tuple[TrainState | None, list[str]]:
        """The newest undamaged state, if there is any, and what a user must be told of those that are not.

        Meant for the start of a run: damaged checkpoints are moved to `damaged/` beside `checkpoints/`, and what an
        interrupted save left is removed. Raises `UserError` when all are damaged (and leaves them where they are), and
        as `restore` does for a checkpoint of another run.
        """
        steps, interrupted = processes.gather("checkpoints to resume from", self._look())[0]
        damage: dict[int, str] = {}
        whole = None
        for step in reversed(steps):
            try:
                self._check(step, identity)
            except Damaged as error:
                damage[step] = str(error)
            else:
                whole = step
                break
        if whole is None and damage:
            lines = [f"  step {step}: {reason}" for step, reason in damage.items()]
            raise UserError(
                f"every checkpoint in {self.directory} is damaged:\n"
                + "\n".join(lines)
                + f"\nput a copy of one in its place to resume there, or remove {self.directory} to start anew"
            )
        processes.first_does("order among checkpoints", lambda: self._tidy(damage, interrupted))
        warnings = [f"saving step {step:,} was interrupted: it does not count" for step in interrupted]
        warnings += [
            f"the checkpoint of step {step:,} is damaged ({reason}): it lies in {self._damaged} now, and training goes "
            f"on from step {whole:,}"
            for step, reason in damage.items()
        ]
        return (None if whole is None else self.restore(whole, abstract, identity)), warnings

    def restore(self, step: int, abstract: TrainState, identity: Identity) -> TrainState:
        """The state of `step`, placed as the shapes and shardings of `abstract` say.

        Raises `UserError` listing each key in which the checkpoint's run differs from this one, or each damaged file.
        """
        with self._damage_as_user_error(step):
            self._check(step, identity)
        parts = self.restore_parts(step, {**abstract.trainable, "optimizer": abstract.opt_state})
        count = jax.device_put(step, abstract.step.sharding).astype(abstract.step.dtype)
        return TrainState(count, {name: parts[name] for name in abstract.trainable}, parts["optimizer"])

    def restore_parts(self, step: int, abstract: Mapping[str, Any]) -> dict[str, Any]:
        """Some of a checkpoint's trees by name, in the dtypes and shardings of `abstract`."""
        with self._damage_as_user_error(step):
            self._check(step)
        with _readable_errors(self.directory, step, "read"):
            return ocp.load_checkpointables(self._at(step), dict(abstract))

    def open_params(self, step: int) -> Callable[[str, tuple[int, ...]], np.ndarray]:
        """A function of a parameter's path and an index into it that reads that much from disk and no more."""
        import tensorstore  # what orbax writes with

        with self._damage_as_user_error(step):
            self._check(step)
        place = str(self._at(step) / "params")
        kvstore = {"driver": "ocdbt", "base": f"{place if '://' in place else f'file://{place}'}/"}

        @functools.cache
        def array(path: str) -> Any:
            spec = {
                "driver": "zarr3",
                "kvstore": kvstore | {"path": path.replace("/", ".") + "/"},
                "recheck_cached_metadata": False,
                "recheck_cached_data": False,
            }
            with _readable_errors(self.directory, step, "read"):
                return tensorstore.open(spec, read=True).result()

        def read(path: str, index: tuple[int, ...]) -> np.ndarray:
            with _readable_errors(self.directory, step, "read"):
                return array(path)[index].read().result()

        return read

    @property
    def _damaged(self) -> epath.Path:
        return self.directory.parent / "damaged"

    def _at(self, step: int) -> epath.Path:
        return self.directory / str(step)

    def _look(self) -> tuple[list[int], list[int]]:
        """The steps that have a manifest, and those that something else is left of."""
        whole: set[int] = set()
        other: set[int] = set()
        for entry in _entries(self.directory):
            if match := STEP_DIRECTORY.fullmatch(entry.name):
                (whole if not match[2] and (entry / MANIFEST).exists() else other).add(int(match[1]))
        return sorted(whole), sorted(other - whole)

    def _check(self, step: int, identity: Identity | None = None) -> None:
        """Raise `Damaged`, or `UserError` for another run's; each step is read through once. All must call it."""
        manifest = agree_on_manifest(self._at(step))
        if identity is not None:
            _check_identity(self.directory, manifest.identity, identity)
        if step not in self._checked:
            check_files(self._at(step), manifest)
            self._checked.add(step)

    def _make_room(self, step: int) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)  # gone, or `keep` is None
        self._checked.discard(step)
        self._delete([*self._look()[1], step])

    def _tidy(self, damage: Mapping[int, str], interrupted: list[int]) -> None:
        for step, reason in damage.items():
            self._damaged.mkdir(parents=True, exist_ok=True)
            taken = {entry.name for entry in _entries(self._damaged)}
            name = next(name for name in (str(step), *(f"{step}-{n}" for n in range(2, 1000))) if name not in taken)
            (self._damaged / f"{name}.txt").write_text(f"step {step} of {self.directory}: {reason}\n")
            self._at(step).rename(self._damaged / name)
        self._delete(interrupted)

    def _delete(self, steps: list[int]) -> None:
        """What is there of `steps`; the manifests go first, so that no half deleted one counts as whole."""
        for entry in _entries(self.directory):
            match = STEP_DIRECTORY.fullmatch(entry.name)
            if match and int(match[1]) in steps:
                (entry / MANIFEST).unlink(missing_ok=True)
                entry.rmtree(missing_ok=True)

    def _finish(self, response: Any, step: int, identity: Identity, held_out_loss: float | None) -> None:
        """What is left to do when the state is copied, in a thread of its own."""
        with _readable_errors(self.directory, step):
            response.result()
            manifest = Manifest(step, held_out_loss, identity, digest_files(self._at(step)))
            unreadable = [f"{name} {file['error']}" for name, file in manifest.files.items() if "error" in file]
            if unreadable:
                raise OSError("; ".join(unreadable))

            def seal() -> None:
                write_manifest(self._at(step), manifest)
                self._delete(self._retired())

            processes.first_does("a checkpoint's last act", seal)

    def _retired(self) -> list[int]:
        """The whole ones that need not stay; one whose manifest is damaged is neither counted nor deleted."""
        if self.keep is None:
            return []
        losses = {}
        for step in self.steps:
            with contextlib.suppress(Damaged):
                losses[step] = read_manifest(self._at(step)).held_out_loss
        ranked = sorted((loss, -step) for step, loss in losses.items() if loss is not None)
        best = {-step for _, step in ranked[: self.keep_best]}
        return sorted(set(sorted(losses)[: -self.keep]) - best)

    def _check_space(self, parts: Any, step: int) -> None:
        if "://" in str(self.directory):
            return
        needed = sum(shard.data.nbytes for leaf in jax.tree.leaves(parts) for shard in _own_shards(leaf))
        free = shutil.disk_usage(self.directory).free
        if free < needed:
            raise UserError(
                _full_disk(self.directory, step) + f" ({needed / 1e9:.2f} GB needed, {free / 1e9:.2f} free)"
            )

    @contextlib.contextmanager
    def _damage_as_user_error(self, step: int) -> Iterator[None]:
        try:
            yield
        except Damaged as error:
            others = ", ".join(str(other) for other in self.steps if other != step) or "none"
            raise UserError(
                f"the checkpoint of step {step} in {self.directory} is not whole: {error}; other steps there: {others}"
            ) from error


def _entries(directory: epath.Path) -> list[epath.Path]:
    """What is in it; in a bucket, a directory without files does not exist."""
    return list(directory.iterdir()) if directory.is_dir() else []


def _check_identity(directory: epath.Path, saved: Identity, identity: Identity) -> None:
    now = json.loads(json.dumps(dict(identity)))
    lines = [
        f"  {key}: {saved.get(key)!r} in the checkpoint, {now[key]!r} now" for key in now if saved.get(key) != now[key]
    ]
    if lines:
        raise UserError(
            f"{directory} holds checkpoints of another run:\n"
            + "\n".join(lines)
            + "\nchoose another train.output, or set these back to resume"
        )


def _storage_options() -> ocp.Context:
    """Arrays are stored in chunks of few layers or less, so that an export reads one layer at a time.

    Not compressed: float32 weights shrink by a twelfth, and that takes longer than to write them.
    """
    context = ocp.Context()
    options = context.array.saving
    options.use_compression = False
    options.storage_options.chunk_byte_size = CHUNK_BYTES
    by_layer = options.StorageOptions(chunk_byte_size=CHUNK_BYTES, shard_axes=(0,))
    options.scoped_storage_options_creator = lambda path, leaf: by_layer if leaf.ndim > 2 else None
    return context


def _own_shards(array: jax.Array) -> Iterator[Any]:
    """The pieces this process writes: each distinct piece once."""
    return (shard for shard in array.addressable_shards if shard.replica_id == 0)


@contextlib.contextmanager
def _readable_errors(directory: epath.Path, step: int, verb: str = "save") -> Iterator[None]:
    """Turn a full disk, and a checkpoint that cannot be read, into `UserError`s; any other failure stays what it is.

    Orbax hides the cause in `__cause__`, and its libraries raise kinds of their own, down to a bare RuntimeError or
    ValueError for a full disk: only the texts along the chain tell them apart.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # of orbax, tensorstore or the disk, which share no class
        causes: list[str] = []
        cause: BaseException | None = error
        while cause is not None:
            causes.append(str(cause) or type(cause).__name__)
            cause = cause.__cause__ or cause.__context__
        if any("No space left" in text or "ENOSPC" in text for text in causes):
            raise UserError(_full_disk(directory, step)) from error
        if verb == "save":
            error.add_note(f"while saving step {step} to {directory}: {causes[-1].splitlines()[0]}")
            raise
        raise UserError(f"cannot {verb} step {step} in {directory}: {causes[-1].splitlines()[0]}") from error


def _full_disk(directory: epath.Path, step: int) -> str:
    return (
        f"the disk is full: step {step} could not be saved to {directory}. The newest whole checkpoint there is "
        "intact; free some space and run the same command again to go on from it"
    )
