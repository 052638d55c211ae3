"""A model under evaluation: opened from whatever a user calls a model, and placed on the devices at hand."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from rich.console import Console

from derta_jax.config import Data, MeshShape, Objective, validated
from derta_jax.data.template import Template
from derta_jax.errors import UserError
from derta_jax.interop.tokenizer import Tokenizer, load_tokenizer, refusal_token_id, stop_token_ids
from derta_jax.models.config import ModelConfig
from derta_jax.models.decoder import Decoder, unrolled
from derta_jax.models.sharding import MESH_AXES, check_mesh
from derta_jax.training.mesh import make_mesh
from derta_jax.training.progress import load_with_progress
from derta_jax.training.restore import ModelSource, find_model


@dataclasses.dataclass(frozen=True)
class Generation:
    """How answers are made, as the command line says. Without a `mesh` it is `generation_mesh`."""

    max_new_tokens: int
    batch_size: int
    template: str | None
    dtype: str
    temperature: float = 0.0
    seed: int = 0
    mesh: MeshShape | None = None

    def __post_init__(self) -> None:
        for option, value in (("--max-new-tokens", self.max_new_tokens), ("--batch-size", self.batch_size)):
            if value < 1:
                raise UserError(f"{option} must be at least 1 (got {value})")
        if self.temperature < 0:
            raise UserError(f"--temperature must not be negative (got {self.temperature})")
        if self.template not in (None, "chat") and self.template.count("{prompt}") != 1:
            raise UserError(f"--template must be `chat` or contain {{prompt}} once (got {self.template!r})")


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model under evaluation, its layers unrolled, its `params` on `mesh`."""

    source: ModelSource
    model: Decoder
    params: Any
    tokenizer: Tokenizer
    template: Template
    mesh: Mesh
    refusal_word: str

    @functools.cached_property
    def refusal_id(self) -> int:
        return refusal_token_id(self.tokenizer, self.refusal_word)

    @functools.cached_property
    def stop_ids(self) -> tuple[int, ...]:
        return stop_token_ids(self.tokenizer)


def open_subject(path: str | Path, generation: Generation, console: Console) -> Subject:
    """A model of any kind, ready to be asked; its template is the one it was trained with."""
    source = find_model(path)
    mesh = make_mesh(generation.mesh) if generation.mesh else generation_mesh(source.config, jax.local_devices())
    tokenizer = load_tokenizer(source.files)
    data = source.run.data.template if source.run else Data.model_fields["template"].default
    word = source.run.objective.refusal_token if source.run else Objective().refusal_token
    template = Template(generation.template or data, tokenizer)
    model = Decoder(source.config, dtype=jnp.dtype(generation.dtype))
    model, params = unrolled(model, load_with_progress(source, generation.dtype, mesh, console))
    return Subject(source, model, params, tokenizer, template, mesh, word)


def parse_mesh(text: str) -> MeshShape:
    """`fsdp=4,tensor=8` as a mesh; axes that are not named are 1, but fsdp takes what they leave."""
    raw = {axis.strip(): size.strip() for axis, _, size in (part.partition("=") for part in text.split(","))}
    return validated(MeshShape, raw, "--mesh", MESH_AXES)


def generation_mesh(config: ModelConfig, devices: Sequence[jax.Device]) -> Mesh:
    """Heads and vocabulary over as many devices as split them evenly, rows over what is left of them.

    Each device reads its part of the weights for each token and none of them travel.
    """
    for tensor in range(len(devices), 1, -1):
        if len(devices) % tensor == 0:
            mesh = make_mesh(MeshShape(data=len(devices) // tensor, fsdp=1, tensor=tensor), devices)
            try:
                check_mesh(config, mesh)
            except UserError:
                continue
            return mesh
    return make_mesh(MeshShape(data=len(devices), fsdp=1), devices)
