"""A bucket for tests: `gs://` paths in memory, through the library that reads the real ones."""

from collections.abc import Iterator

import pytest
from etils.epath import backend
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry


class Bucket(MemoryFileSystem):
    """Like the memory file system, under another name and with files of its own."""

    protocol = ("gcs", "gs")
    store: dict = {}  # noqa: RUF012
    pseudo_dirs: list = [""]  # noqa: RUF012

    @classmethod
    def _strip_protocol(cls, path):
        return MemoryFileSystem._strip_protocol(str(path).replace("gs://", "memory://", 1))


@pytest.fixture
def bucket(monkeypatch) -> Iterator[str]:
    """A URL that epath can write to."""
    for protocol in Bucket.protocol:
        monkeypatch.setitem(_registry, protocol, Bucket)
    backend.fsspec_backend._get_filesystem.cache_clear()
    Bucket.store.clear()
    yield "gs://bucket/run"
    backend.fsspec_backend._get_filesystem.cache_clear()
