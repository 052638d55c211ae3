"""Where a model or a dataset lies: on disk, at a URL that fsspec can read (`gs://…`), or under a hub id `org/name`."""

import atexit
import contextlib
import functools
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from derta_jax.errors import UserError
from derta_jax.interop.tensor_files import as_os_error, file_system
from derta_jax.interop.tokenizer import TOKENIZER_FILES

INDEX = "model.safetensors.index.json"
ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
SMALL_FILES = ("config.json", "generation_config.json", INDEX, "derta_config.yaml", *ADAPTER, *TOKENIZER_FILES)
WEIGHTS = "model*.safetensors"
"""Not `consolidated.safetensors`, which some authors put beside it: the same weights under other names."""

HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+", re.ASCII)


def is_url(path: str | Path) -> bool:
    """Whether fsspec is to read it. A URL must stay a string: `Path` makes one slash of two."""
    return "://" in str(path)


def local_files(path: str | Path) -> Path:
    """A local directory with a model's small files: configs, tokenizer, chat template; weights only if it is `path`.

    Of a URL they are copied, of a hub id downloaded, once a process. A directory that does not exist comes back as it
    is, for the caller to say what it lacks. Raises `UserError` when a URL or the hub cannot be read.
    """
    if is_url(path):
        return _copy_small_files(str(path).rstrip("/"))
    return _download(str(path), SMALL_FILES) if _is_hub_id(path) else Path(path)


def weights_place(path: str | Path) -> str | Path:
    """The URL or the local directory that holds a model's safetensors; those of a hub id are downloaded."""
    if is_url(path):
        return str(path).rstrip("/")
    return _download(str(path), (*SMALL_FILES, WEIGHTS)) if _is_hub_id(path) else Path(path)


def local_copy(path: str | Path) -> Path:
    """Any file or directory on this machine's disk: itself, or the copy of a URL, which is made once a process.

    Raises `UserError` when a URL cannot be read or there is nothing.
    """
    return _copy(str(path).rstrip("/")) if is_url(path) else Path(path)


def holds(place: str | Path, pattern: str) -> bool:
    """Whether a URL or a local directory holds files whose names match."""
    if not is_url(place):
        return any(Path(place).glob(pattern))
    with _reading(str(place)):
        system, folder = file_system(str(place))
        with as_os_error():
            return bool(system.glob(f"{folder}/{pattern}"))


def _is_hub_id(path: str | Path) -> bool:
    return not Path(path).exists() and HUB_ID.fullmatch(str(path)) is not None


@functools.cache
def _copy(url: str) -> Path:
    copy = _temporary_directory() / url.rpartition("/")[2]
    with _reading(url):
        system, place = file_system(url)
        with as_os_error():
            if system.isfile(place):
                system.get_file(place, str(copy))
            else:
                system.get(f"{place}/", f"{copy}/", recursive=True)
    return copy


@functools.cache
def _copy_small_files(url: str) -> Path:
    with _reading(url):
        system, folder = file_system(url)
        with as_os_error():
            found = system.cat([f"{folder}/{name}" for name in SMALL_FILES], on_error="return")
            for content in found.values():
                if isinstance(content, Exception) and not isinstance(content, FileNotFoundError):
                    raise content
    directory = _temporary_directory()
    for name, content in found.items():
        if isinstance(content, bytes):
            (directory / name.rpartition("/")[2]).write_bytes(content)
    return directory


def _temporary_directory() -> Path:
    """One that goes with the process."""
    directory = Path(tempfile.mkdtemp(prefix="derta-jax-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return directory


@contextlib.contextmanager
def _reading(url: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        extra = ": pip install 'derta-jax[gcs]'" if url.startswith("gs://") and "ImportError" in str(error) else ""
        raise UserError(f"cannot read {url}: {error}{extra}") from error


@functools.cache
def _download(name: str, patterns: tuple[str, ...]) -> Path:
    from huggingface_hub import errors, snapshot_download

    start = f"{name} is neither a local directory nor"
    login = "log in with `hf auth login` or set HF_TOKEN"
    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns)))
    except errors.GatedRepoError as error:
        message = f"{name} is gated on the Hugging Face hub: accept its terms on its page there, then {login}"
        raise UserError(message) from error
    except errors.LocalEntryNotFoundError as error:
        offline = isinstance(error.__cause__, errors.OfflineModeIsEnabled)
        reason = "HF_HUB_OFFLINE is set" if offline else f"the hub cannot be reached ({_cause(error)})"
        raise UserError(
            f"{start} whole in the local cache of the Hugging Face hub, and {reason}: "
            "fetch it where there is a network with `hf download`, or give a directory"
        ) from error
    except Exception as error:  # the client lets through what its HTTP library and the disk raise: no class is shared
        status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else None
        if isinstance(error, errors.RepositoryNotFoundError) or status == 401:
            raise UserError(f"{start} a model on the Hugging Face hub (for a private one, {login})") from error
        raise UserError(f"cannot download {name} from the Hugging Face hub: {_cause(error)}") from error


def _cause(error: BaseException) -> str:
    lines = str(error.__cause__ or error).splitlines()
    return lines[0] if lines else type(error).__name__
