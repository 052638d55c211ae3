"""What a whole checkpoint is: a manifest, written last, with the size and the SHA-256 of every other file."""

import errno
import hashlib
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from etils import epath

from derta_jax.training.pod import processes

MANIFEST = "manifest.json"
READ_BYTES = 2**23
HOURS = 3600.0

Digest = Mapping[str, Any]
"""`bytes` and `sha256` of a file, or `error`: why it cannot be read."""


class Damaged(Exception):
    """What about a checkpoint is not as it was saved: which files, and what is wrong with them."""


class Manifest(NamedTuple):
    """`identity` is that of the run; `files` are by their paths in the checkpoint, `/` between folders."""

    step: int
    held_out_loss: float | None
    identity: Mapping[str, Any]
    files: Mapping[str, Digest]


def write_manifest(directory: epath.Path, manifest: Manifest) -> None:
    """Make a checkpoint whole: the manifest is there with all its content, or not at all."""
    text = _render(manifest._asdict())
    if "://" in str(directory):  # what is put into a bucket appears when it is whole
        (directory / MANIFEST).write_text(text)
    else:
        partial = directory / f"{MANIFEST}.partial"
        partial.write_text(text)
        partial.replace(directory / MANIFEST)


def read_manifest(directory: epath.Path) -> Manifest:
    """Raises `Damaged` where it is missing, or a single bit of it is not as it was written."""
    try:
        return _parse((directory / MANIFEST).read_bytes())
    except FileNotFoundError as error:
        raise Damaged(f"{MANIFEST} is missing") from error
    except OSError as error:
        raise Damaged(f"{MANIFEST} {_unreadable(error)}") from error


def agree_on_manifest(directory: epath.Path) -> Manifest:
    """`read_manifest` by process 0 for all of them; all must call it."""
    answer: Any = None
    if processes.index() == 0:
        try:
            answer = {"manifest": read_manifest(directory)._asdict()}
        except Damaged as error:
            answer = {"damage": str(error)}
    answer = processes.gather("a checkpoint's manifest", answer)[0]
    if "damage" in answer:
        raise Damaged(answer["damage"])
    return Manifest(**answer["manifest"])


def digest_files(directory: epath.Path) -> dict[str, Digest]:
    """Of every file but the manifest. All processes must call it: they share the work and get the same answer."""
    names = processes.gather("a checkpoint's files", _list_files(directory) if processes.index() == 0 else None)[0]
    mine = {name: _digest(directory / name) for name in names[processes.index() :: processes.count()]}
    shares = processes.gather("a checkpoint's digests", mine, timeout=6 * HOURS)
    return {name: digest for share in shares for name, digest in share.items()}


def check_files(directory: epath.Path, manifest: Manifest) -> None:
    """Raise `Damaged` naming each file that is missing, changed, or not of the checkpoint; all processes must call."""
    found = digest_files(directory)
    damage = [
        f"{name} {problem}"
        for name in sorted(found.keys() | manifest.files.keys())
        if (problem := _damage(manifest.files.get(name), found.get(name)))
    ]
    if damage:
        raise Damaged("; ".join(damage))


def _list_files(directory: epath.Path) -> list[str]:
    files: list[str] = []
    for entry in directory.iterdir():
        if entry.is_dir():
            files += [f"{entry.name}/{name}" for name in _list_files(entry)]
        elif entry.name != MANIFEST:
            files.append(entry.name)
    return sorted(files)


def _digest(file: epath.Path) -> Digest:
    """The interpreter is free for other threads while a block is read and while it is hashed."""
    sha256, size = hashlib.sha256(), 0
    try:
        with file.open("rb") as stream:
            while block := stream.read(READ_BYTES):
                sha256.update(block)
                size += len(block)
    except OSError as error:
        return {"error": _unreadable(error)}
    return {"bytes": size, "sha256": sha256.hexdigest()}


def _unreadable(error: OSError) -> str:
    """What a broken disk says; a network that is down, or a right that is missing, is no damage and is raised."""
    if error.errno not in (errno.EIO, errno.ENOENT):
        raise error
    return f"cannot be read: {error.strerror}"


def _damage(saved: Digest | None, found: Digest | None) -> str | None:
    if saved is None:
        return "was not there when it was saved"
    if found is None:
        return "is missing"
    if "error" in found:
        return str(found["error"])
    if saved["bytes"] != found["bytes"]:
        return f"has {found['bytes']:,} bytes instead of {saved['bytes']:,}"
    return None if saved["sha256"] == found["sha256"] else f"was changed: its SHA-256 is not that in {MANIFEST}"


def _render(content: dict[str, Any]) -> str:
    """JSON that ends with its own digest."""
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return json.dumps(content | {"sha256": digest}, indent=1) + "\n"


def _parse(data: bytes) -> Manifest:
    try:
        content = json.loads(data)
        del content["sha256"]
        if _render(content).encode() == data:
            return Manifest(**content)
    except (ValueError, TypeError, KeyError):
        pass
    raise Damaged(f"{MANIFEST} was changed")
