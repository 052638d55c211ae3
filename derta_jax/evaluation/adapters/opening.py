"""A model as another tool's options name it."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console

from derta_jax.data.template import Template
from derta_jax.errors import UserError, did_you_mean
from derta_jax.evaluation.subject import Generation, Subject, open_subject, parse_mesh

DTYPES = ("float32", "bfloat16")


def open_model(path: str, batch_size: int, dtype: str, template: str | None, mesh: Any) -> Subject:
    """A model of any kind, on all local devices or on the mesh that `mesh` names (`fsdp=4,tensor=8`, or a mapping).

    Raises `UserError` for an option that is not one, naming it.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype is {dtype!r}: it must be {' or '.join(DTYPES)}")
    if isinstance(batch_size, bool) or not str(batch_size).isdecimal() or int(batch_size) < 1:
        raise UserError(f"batch_size is {batch_size!r}: it must be a number of at least 1")
    generation = Generation(
        max_new_tokens=1,
        batch_size=int(batch_size),
        template=template,
        dtype=dtype,
        mesh=mesh and parse_mesh(_joined(mesh)),
    )
    return open_subject(path, generation, Console(stderr=True))


def refuse_unknown(options: Mapping[str, Any], known: Iterable[str], kind: str) -> None:
    """Raise `UserError` with the first option that is not known, and the nearest that is."""
    known = sorted(known)
    for name in options:
        raise UserError(f"unknown {kind} {name!r}{did_you_mean(name, known)} (there are: {', '.join(known)})")


def conversation_template(subject: Subject, asked: str | None) -> Template:
    """The template `asked` for, else the one that we trained the model with, else its tokenizer's chat template."""
    if asked or subject.source.run:
        return subject.template
    if not subject.tokenizer.hf.chat_template:
        raise UserError(
            f"{subject.source.path} says nowhere how a conversation is written: its tokenizer has no chat template, "
            "and it is not a model that derta trained. Set template to a text with {prompt}"
        )
    return dataclasses.replace(subject.template, pattern="chat")


def _joined(mesh: str | Sequence[str] | Mapping[str, int]) -> str:
    """Command lines cut `fsdp=4,tensor=8` at the comma, or read it as a mapping."""
    if isinstance(mesh, Mapping):
        mesh = [f"{axis}={size}" for axis, size in mesh.items()]
    return mesh if isinstance(mesh, str) else ",".join(mesh)
