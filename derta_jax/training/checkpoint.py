"""Checkpoints of a run: orbax, asynchronous, and only restored into the run that wrote them."""

import contextlib
import functools
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from derta_jax.errors import UserError
from derta_jax.training.step import TrainState

Identity = Mapping[str, Any]
"""What must be the same to go on training, as dotted keys: the architecture, the data's hash, the recipe, the seed …"""


CHUNK_BYTES = 2**26


class Checkpoints:
    """The `checkpoints/` of a run, one directory a step; the newest `keep` stay (None: all). A context manager."""

    def __init__(self, directory: str | Path, keep: int | None = 2):
        self.directory = Path(directory).absolute()
        self.directory.mkdir(parents=True, exist_ok=True)
        self._orbax = ocp.training.Checkpointer(
            self.directory,
            preservation_policy=ocp.training.preservation_policies.LatestN(keep),
            cleanup_tmp_directories=True,
        )
        self._saving: tuple[int, ocp.AsyncResponse[bool]] | None = None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.wait()
        finally:
            self._orbax.close()

    @property
    def latest_step(self) -> int | None:
        """The newest whole checkpoint; one cut off while it was written does not count."""
        latest = self._orbax.latest
        return None if latest is None else latest.step

    @property
    def steps(self) -> list[int]:
        return [checkpoint.step for checkpoint in self._orbax.checkpoints]

    def identity(self, step: int) -> Identity:
        return self._orbax.checkpointables_metadata(step).custom_metadata or {}

    def save(self, state: TrainState, identity: Identity) -> None:
        """Start writing `state`; returns once it is copied off the devices. Raises `UserError` on a full disk."""
        self.save_parts(int(state.step), {**state.trainable, "optimizer": state.opt_state}, identity)

    def save_parts(self, step: int, parts: Mapping[str, Any], identity: Identity) -> None:
        """Start writing trees of arrays under their names, as `save` does."""
        self.wait()
        self._check_space(parts, step)
        with _readable_errors(self.directory, step), _small_chunks():
            response = self._orbax.save_checkpointables_async(
                step, dict(parts), force=True, custom_metadata=dict(identity)
            )
        if response is not None:
            self._saving = (step, response)

    def wait(self) -> None:
        """Return when the last `save` is on disk; its errors surface here."""
        if self._saving is None:
            return
        (step, response), self._saving = self._saving, None
        with _readable_errors(self.directory, step):
            response.result()

    def restore(self, step: int, abstract: TrainState, identity: Identity) -> TrainState:
        """The state of `step`, placed as the shapes and shardings of `abstract` say.

        Raises `UserError` listing each key in which the checkpoint's run differs from this one.
        """
        saved = self.identity(step)
        different = [key for key in identity if saved.get(key) != identity[key]]
        if different:
            lines = [f"  {key}: {saved.get(key)!r} in the checkpoint, {identity[key]!r} now" for key in different]
            raise UserError(
                f"{self.directory} holds checkpoints of another run:\n"
                + "\n".join(lines)
                + "\nchoose another train.output, or set these back to resume"
            )
        parts = self.restore_parts(step, {**abstract.trainable, "optimizer": abstract.opt_state})
        count = jax.device_put(step, abstract.step.sharding).astype(abstract.step.dtype)
        return TrainState(count, {name: parts[name] for name in abstract.trainable}, parts["optimizer"])

    def restore_parts(self, step: int, abstract: Mapping[str, Any]) -> dict[str, Any]:
        """Some of a checkpoint's trees by name, in the dtypes and shardings of `abstract`."""
        with _readable_errors(self.directory, step, "read"):
            return self._orbax.load_checkpointables(step, dict(abstract))

    def open_params(self, step: int) -> Callable[[str, tuple[int, ...]], np.ndarray]:
        """A function of a parameter's path and an index into it that reads that much from disk and no more."""
        import tensorstore  # what orbax writes with

        kvstore = {"driver": "ocdbt", "base": f"file://{self.directory / str(step) / 'params'}/"}

        @functools.cache
        def array(path: str) -> Any:
            spec = {"driver": "zarr3", "kvstore": kvstore | {"path": path.replace("/", ".") + "/"}}
            with _readable_errors(self.directory, step, "read"):
                return tensorstore.open(spec, read=True).result()

        def read(path: str, index: tuple[int, ...]) -> np.ndarray:
            with _readable_errors(self.directory, step, "read"):
                return array(path)[index].read().result()

        return read

    def _check_space(self, parts: Any, step: int) -> None:
        needed = sum(shard.data.nbytes for leaf in jax.tree.leaves(parts) for shard in _own_shards(leaf))
        free = shutil.disk_usage(self.directory).free
        if free < needed:
            raise UserError(
                _full_disk(self.directory, step) + f" ({needed / 1e9:.2f} GB needed, {free / 1e9:.2f} free)"
            )


def _small_chunks() -> ocp.Context:
    """Arrays are stored in chunks of few layers or less, so that an export reads one layer at a time."""
    context = ocp.Context()
    options = context.array.saving
    options.storage_options.chunk_byte_size = CHUNK_BYTES
    by_layer = options.StorageOptions(chunk_byte_size=CHUNK_BYTES, shard_axes=(0,))
    options.scoped_storage_options_creator = lambda path, leaf: by_layer if leaf.ndim > 2 else None
    return context


def _own_shards(array: jax.Array) -> Iterator[Any]:
    """The pieces this process writes: each distinct piece once."""
    return (shard for shard in array.addressable_shards if shard.replica_id == 0)


@contextlib.contextmanager
def _readable_errors(directory: Path, step: int, verb: str = "save") -> Iterator[None]:
    """Turn a full disk, and a checkpoint that cannot be read, into `UserError`s; any other failure stays what it is.

    Orbax hides the cause in `__cause__`, and its libraries raise kinds of their own, down to a bare RuntimeError or
    ValueError for a full disk: only the texts along the chain tell them apart.
    """
    try:
        yield
    except Exception as error:
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


def _full_disk(directory: Path, step: int) -> str:
    return (
        f"the disk is full: step {step} could not be saved to {directory}. The newest whole checkpoint there is "
        "intact; free some space and run the same command again to go on from it"
    )
