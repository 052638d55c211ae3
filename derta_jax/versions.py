"""What is installed, and what a bug report needs besides (`derta --version --verbose`)."""

import contextlib
import functools
import hashlib
import importlib.metadata
import os
import platform
from pathlib import Path

from derta_jax import __version__

PACKAGES = ("jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint")
MORE_PACKAGES = ("grain", "tensorflow-datasets", "numpy", "tokenizers", "transformers", "safetensors", "torch")
VARIABLES = ("JAX_", "XLA_", "LIBTPU_", "TPU_", "MEGASCALE_", "CUDA_VISIBLE", "HF_HOME", "HF_HUB_OFFLINE")
"""How the names of environment variables begin that change what a run does; none of them holds a secret."""


@functools.cache
def versions(packages: tuple[str, ...] = PACKAGES) -> dict[str, str]:
    """By name: Python's, ours with the hash of our files, and those of the packages that are installed."""
    found = {"python": platform.python_version(), "derta_jax": f"{__version__} ({_source_hash()})"}
    for name in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _source_hash() -> str:
    """Of this package's own files: a change that came to some machines only has no other version."""
    root = Path(__file__).parent
    digest = hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        digest.update(str(file.relative_to(root)).encode() + file.read_bytes())
    return digest.hexdigest()[:8]


def bug_report() -> str:
    """Versions, machine, devices and variables, a line each."""
    variables = {name: value for name, value in sorted(os.environ.items()) if name.startswith(VARIABLES)}
    facts = {
        **versions(PACKAGES + MORE_PACKAGES),
        "platform": f"{platform.platform()}, {os.cpu_count()} CPU cores",
        "devices": _devices(),
        **variables,
    }
    return "\n".join(f"{name:20s} {value}" for name, value in facts.items())


def _devices() -> str:
    import jax

    try:
        return f"{jax.device_count()} × {jax.devices()[0].device_kind} ({jax.default_backend()})"
    except RuntimeError as error:  # a device that does not answer is worth reporting, too
        return f"none: {error}"
