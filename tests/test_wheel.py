"""The wheel: all of the package and nothing else, working where there is no repository."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from derta_jax import __version__

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the tracked files, as from a fresh clone."""
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, tracked.split("\0")):
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).exists():
            target.write_bytes((ROOT / name).read_bytes())
    words = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(built), str(source)]
    subprocess.run(words, check=True)
    (path,) = built.glob("*.whl")
    return path


def test_it_holds_the_package_whole_and_the_licence(wheel: Path) -> None:
    assert wheel.name == f"derta_jax-{__version__}-py3-none-any.whl"
    names = set(zipfile.ZipFile(wheel).namelist())
    ours = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "derta_jax").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    about = {name for name in names if name.startswith(f"derta_jax-{__version__}.dist-info/")}
    assert names - about == ours
    assert f"derta_jax-{__version__}.dist-info/licenses/LICENSE" in about


def test_it_works_without_the_repository(wheel: Path, tmp_path: Path) -> None:
    """Its files are in front of this checkout."""
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    checks = (
        "import derta_jax, pathlib;"
        "from derta_jax.cli import main;"
        "assert pathlib.Path(derta_jax.__file__).is_relative_to(pathlib.Path('site').resolve()), derta_jax.__file__;"
        "main(['--version'])"
    )
    ran = subprocess.run(
        [sys.executable, "-c", checks],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == f"derta_jax {__version__}\n"
