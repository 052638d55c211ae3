"""Fine-tune language models that can refuse at any point of an answer, in JAX on TPU."""

from typing import Any

__version__ = "0.1.0"
__all__ = ["export_pretrained", "load_pretrained"]


def __getattr__(name: str) -> Any:
    """Import JAX when it is needed, not for `derta --help`."""
    if name == "load_pretrained":
        from derta_jax.interop.hf_load import load_pretrained

        return load_pretrained
    if name == "export_pretrained":
        from derta_jax.interop.hf_export import export_pretrained

        return export_pretrained
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
