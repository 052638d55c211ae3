"""Files that are appended to, for a run directory that may be a bucket, where nothing can be appended to."""

import shutil
import tempfile
from pathlib import Path
from typing import Any

from etils import epath

from derta_jax.interop.source import is_url


class Mirror:
    """`local` is where a run directory's files are written: the directory itself, or for a URL a temporary one.

    `pull` and `push` copy files and folders between the two; of a local directory there is nothing to copy.
    """

    def __init__(self, output: Any):
        self.output = epath.Path(output)
        self.remote = is_url(output)
        self.local = Path(tempfile.mkdtemp(prefix="derta-jax-")) if self.remote else Path(output)
        self.local.mkdir(parents=True, exist_ok=True)

    def pull(self, *names: str) -> None:
        """Fetch the files that there are."""
        for name in names if self.remote else ():
            if (source := self.output / name).exists():
                source.copy(self.local / name, overwrite=True)

    def push(self, *names: str) -> None:
        """Copy these files, and all that lies in these folders, to the run directory, as far as they are there."""
        for name in names if self.remote else ():
            place = self.local / name
            for file in sorted(place.rglob("*")) if place.is_dir() else [place] if place.is_file() else []:
                if file.is_file():
                    target = self.output / file.relative_to(self.local).as_posix()
                    target.parent.mkdir(parents=True, exist_ok=True)
                    epath.Path(file).copy(target, overwrite=True)

    def remove(self) -> None:
        """Remove the temporary copy."""
        if self.remote:
            shutil.rmtree(self.local, ignore_errors=True)
