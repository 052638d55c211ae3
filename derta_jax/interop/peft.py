"""PEFT adapters in and out: `adapter_config.json` and `adapter_model.safetensors`, as `peft` and vLLM read them.

Keys are `base_model.model.<module>.lora_A.weight` [R, in] and `.lora_B.weight` [out, R]. peft on transformers 5 fuses a
mixture's experts into one tensor a layer; both layouts are read, the one with a tensor an expert is written.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from safetensors import SafetensorError
from safetensors.numpy import load_file

from derta_jax.errors import UserError, did_you_mean
from derta_jax.interop.tensor_files import TensorWriter
from derta_jax.models.config import ModelConfig
from derta_jax.models.lora import Adapter, factor_sharding, target_rows
from derta_jax.models.params import Parameter

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."

UNSUPPORTED = (
    "alora_invocation_tokens",
    "fan_in_fan_out",
    "layer_replication",
    "layers_to_transform",
    "lora_bias",
    "modules_to_save",
    "trainable_token_indices",
    "use_dora",
)
"""Settings that change what an adapter computes, beyond W + scale · B A."""

FUSED = re.compile(r"(model\.layers\.\d+)\.mlp\.experts\.(base_layer\.)?lora_(A|B)\.weight")
"""How peft names a layer's experts as transformers 5 holds them: w1 and w3 inside (base_layer), w2 around them."""


def adapter_base(directory: str | Path) -> str:
    """The model that an adapter goes on, as its `adapter_config.json` names it."""
    base = _read_config(Path(directory)).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise UserError(f"{Path(directory) / ADAPTER_CONFIG} does not name its base_model_name_or_path")
    return base


def load_adapter(directory: str | Path, config: ModelConfig, mesh: Mesh | None = None) -> Adapter:
    """A float32 adapter for a model of `config`, its factors sharded over `mesh` or on the first device.

    Raises one `UserError` that lists every missing, unknown or wrongly shaped tensor and every setting that is not
    supported.
    """
    directory = Path(directory)
    raw = _read_config(directory)
    tensors = _read_tensors(directory, config)
    places = {
        name: (row, index, factor)
        for row in target_rows(config)
        for index, weight in row.hf_names(config).items()
        for factor, name in _keys(weight).items()
    }
    problems = [*_unsupported(raw, target_rows(config))]
    problems += [f"unknown {name}{did_you_mean(name, places)}" for name in tensors if name not in places]
    present = [row for row in target_rows(config) if any(places[name][0] is row for name in tensors if name in places)]
    if not present:
        problems.append("no tensor of an adapter")
    ranks = {}
    for row in present:
        ranks[row.name], found = _check_row(config, row, tensors)
        problems += found
    if problems:
        raise UserError(f"the adapter in {directory} does not fit a {config.model_type}:\n  " + "\n  ".join(problems))

    factors: dict[str, dict[str, np.ndarray]] = {}
    for row in present:
        sides: dict[str, list[np.ndarray]] = {"a": [], "b": []}
        for weight in row.hf_names(config).values():
            for factor, name in _keys(weight).items():
                sides[factor].append(tensors[name].astype(np.float32).T)
        stack = row.shape(config)[: row.stacked]
        factors[row.name] = {
            factor: np.stack(parts).reshape(*stack, *parts[0].shape) for factor, parts in sides.items()
        }
    scales = {row.name: _scale(raw, row, ranks[row.name]) for row in present}
    placed = {
        row.name: {
            factor: jax.make_array_from_callback(array.shape, factor_sharding(row, factor, mesh), array.__getitem__)
            for factor, array in factors[row.name].items()
        }
        for row in present
    }
    return Adapter(placed, scales)


def adapter_tensors(adapter: Adapter, config: ModelConfig) -> dict[str, np.ndarray]:
    """An adapter's factors under PEFT's keys."""
    tensors = {}
    for row in target_rows(config):
        if row.name in adapter.factors:
            host = {factor: np.asarray(array) for factor, array in adapter.factors[row.name].items()}
            for index, weight in row.hf_names(config).items():
                for factor, name in _keys(weight).items():
                    tensors[PREFIX + name] = host[factor][index].T
    return tensors


def adapter_config(adapter: Adapter, config: ModelConfig, base: str, dropout: float) -> dict[str, Any]:
    """The `adapter_config.json` of an adapter that goes on the model `base`."""
    rows = [row for row in target_rows(config) if row.name in adapter.factors]
    ranks = {row.hf_module: adapter.factors[row.name]["a"].shape[-1] for row in rows}
    alphas = {row.hf_module: adapter.scales[row.name] * ranks[row.hf_module] for row in rows}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    # peft refuses dropout on experts, which it holds as plain tensors
    experts = any("experts" in row.axes for row in rows)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": _integer(alpha),
        "lora_dropout": 0.0 if experts else dropout,
        "target_modules": list(ranks),
        "rank_pattern": {name: each for name, each in ranks.items() if each != rank},
        "alpha_pattern": {name: _integer(each) for name, each in alphas.items() if each != alpha},
        "bias": "none",
        "inference_mode": True,
    }


def write_adapter(
    adapter: Adapter, config: ModelConfig, directory: Path, base: str, dropout: float = 0.0, dtype: str = "float32"
) -> None:
    """Write both files into an existing directory."""
    tensors = adapter_tensors(adapter, config)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    with TensorWriter(directory / ADAPTER_WEIGHTS, shapes, jnp.dtype(dtype)) as writer:
        for tensor in tensors.values():
            writer.write(tensor)
    text = json.dumps(adapter_config(adapter, config, base, dropout), indent=2) + "\n"
    (directory / ADAPTER_CONFIG).write_text(text, encoding="utf-8")


def _keys(weight: str) -> dict[str, str]:
    module = weight.removesuffix(".weight")
    return {"a": f"{module}.lora_A.weight", "b": f"{module}.lora_B.weight"}


def _integer(value: float) -> float | int:
    return round(value) if math.isclose(value, round(value)) else value


def _read_config(directory: Path) -> dict[str, Any]:
    file = directory / ADAPTER_CONFIG
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"no adapter in {directory}: {ADAPTER_CONFIG} is missing") from error
    except ValueError as error:
        raise UserError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(raw, dict):
        raise UserError(f"{file} must hold a JSON object, not a {type(raw).__name__}")
    return raw


def _read_tensors(directory: Path, config: ModelConfig) -> dict[str, np.ndarray]:
    """Tensors by name, without PEFT's prefix, experts apart."""
    file = directory / ADAPTER_WEIGHTS
    if not file.is_file():
        if any(directory.glob("*.bin")):
            raise UserError(
                f"{directory} holds a pickled adapter (*.bin), which is never loaded: save it as safetensors"
            )
        raise UserError(f"no adapter weights in {directory}: {ADAPTER_WEIGHTS} is missing")
    try:
        stored = load_file(file)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is not a whole safetensors file: {error}") from error
    tensors: dict[str, np.ndarray] = {}
    for name, tensor in stored.items():
        name = name.removeprefix(PREFIX)
        match = FUSED.fullmatch(name)
        if match and config.experts:
            tensors.update(_experts_apart(match, tensor, config))
        else:
            tensors[name] = tensor
    return tensors


def _experts_apart(match: re.Match[str], tensor: np.ndarray, config: ModelConfig) -> Iterator[tuple[str, np.ndarray]]:
    """One of peft's fused tensors as one an expert: lora_A [E·R, in] by expert, lora_B [out, R·E] by rank."""
    layer, inside, factor = match.groups()
    for expert in range(config.experts):
        module = f"{layer}.block_sparse_moe.experts.{expert}"
        if factor == "A":
            part = tensor.reshape(config.experts, -1, tensor.shape[1])[expert]
            parts = {"w1": part, "w3": part} if inside else {"w2": part}
        else:
            part = tensor.reshape(tensor.shape[0], -1, config.experts)[:, :, expert]
            half = len(part) // 2
            parts = {"w1": part[:half], "w3": part[half:]} if inside else {"w2": part}
        for name, each in parts.items():
            yield f"{module}.{name}.lora_{factor}.weight", each


def _check_row(config: ModelConfig, row: Parameter, tensors: Mapping[str, np.ndarray]) -> tuple[int, list[str]]:
    """The rank of a row's factors, and what is wrong with them."""
    names = [_keys(weight) for weight in row.hf_names(config).values()]
    rank = next((tensors[each["a"]].shape[0] for each in names if each["a"] in tensors), 0)
    outputs, inputs = row.hf_shape(config)
    problems = []
    for each in names:
        for factor, shape in (("a", (rank, inputs)), ("b", (outputs, rank))):
            name = each[factor]
            if name not in tensors:
                problems.append(f"missing {name} {list(shape)}")
            elif tensors[name].shape != shape:
                problems.append(f"{name} has shape {list(tensors[name].shape)}, expected {list(shape)}")
    return rank, problems


def _unsupported(raw: Mapping[str, Any], rows: Sequence[Parameter]) -> Iterator[str]:
    if raw.get("peft_type") != "LORA":
        yield f"peft_type: {raw.get('peft_type')!r} is not supported, only 'LORA'"
    if raw.get("bias", "none") != "none":
        yield f"bias: {raw['bias']!r} is not supported, only 'none'"
    if not isinstance(raw.get("lora_alpha"), int | float):
        yield f"lora_alpha must be a number (got {raw.get('lora_alpha')!r})"
    yield from (f"{key}: {raw[key]!r} is not supported" for key in UNSUPPORTED if raw.get(key))
    known = set().union(*(_pattern_names(row) for row in rows))
    for pattern in raw.get("alpha_pattern") or {}:
        if _plain_pattern(pattern) not in known:
            yield f"alpha_pattern: {pattern!r} is not one of {', '.join(sorted(known))}"


def _scale(raw: Mapping[str, Any], row: Parameter, rank: int) -> float:
    """alpha / rank, or alpha / √rank with rank-stabilised LoRA (arXiv 2312.03732)."""
    patterns = {_plain_pattern(pattern): alpha for pattern, alpha in (raw.get("alpha_pattern") or {}).items()}
    alpha = next((patterns[name] for name in _pattern_names(row) if name in patterns), raw["lora_alpha"])
    return alpha / (math.sqrt(rank) if raw.get("use_rslora") else rank)


def _pattern_names(row: Parameter) -> tuple[str, ...]:
    """What rank and alpha patterns call a row's module, fused by transformers 5 or not."""
    fused = {"w1": "gate_up_proj", "w3": "gate_up_proj", "w2": "down_proj"}
    return (row.hf_module, fused[row.hf_module]) if row.hf_module in fused else (row.hf_module,)


def _plain_pattern(pattern: str) -> str:
    r"""peft writes `.*\.gate_up_proj` for a module name: patterns of untrusted files are not run as patterns."""
    return pattern.removeprefix("^").removeprefix(r".*\.")
