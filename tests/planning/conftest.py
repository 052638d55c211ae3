"""Models so small that a TPU program of one is compiled in seconds, and plans that need no compiler at all."""

from typing import Any

import pytest

from derta_jax.config import RunConfig
from derta_jax.models.config import ModelConfig
from derta_jax.planning.compiled import GIB, Compiled
from derta_jax.planning.hlo_cost import Collective, ProgramCost
from derta_jax.planning.published import LLAMA_3_8B

SMALL: dict[str, Any] = LLAMA_3_8B | {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "num_hidden_layers": 2,
    "vocab_size": 256,
}
"""The `config.json` of a Llama with one head, of a width that a TPU likes."""


def small_model(**changes: Any) -> ModelConfig:
    return ModelConfig.from_hf(SMALL | changes, "small")


def plan_config(**sections: Any) -> RunConfig:
    """Ten steps of four rows of 128 tokens; sections given as keywords are merged in."""
    raw: dict[str, Any] = {
        "model": {"path": "meta-llama/Meta-Llama-3-8B"},
        "data": {"path": "nowhere.jsonl"},
        "train": {"output": "nowhere", "steps": 10, "batch_size": 4, "sequence_length": 128},
    }
    for section, values in sections.items():
        raw[section] = raw.get(section, {}) | values
    return RunConfig.model_validate(raw)


SHARES = {"parameters": 0.08, "optimizer": 0.16, "gradients": 0.24, "activations": 0.2, "rest": 0.32}
"""Of the memory of made-up programs."""


def made_up(fits: bool = True, cycles: float = 3e9, peak_gib: float = 3.0) -> Compiled:
    """What a compiler might have said of a program for four chips."""
    parts = {name: share * peak_gib * GIB for name, share in SHARES.items()}
    gathers = {"all-gather": Collective(2, 4, 9e9, 0.0)}
    cost = ProgramCost(cycles, gathers, 0.0, {"tpu_custom_call/gmm": 3, "copy-start": 1})
    mesh = {"data": 1, "fsdp": 4, "expert": 1, "tensor": 1}
    return Compiled(
        fits=fits,
        mesh=mesh,
        peak_bytes=peak_gib * GIB,
        host_bytes=0.0,
        limit_bytes=15.75 * GIB,
        breakdown=parts,
        cost=cost if fits else None,
        seconds=1.5,
    )


@pytest.fixture
def libtpu() -> None:
    """TPU programs are compiled by libtpu, which is there on Linux with the extra `tpu`."""
    pytest.importorskip("libtpu")
