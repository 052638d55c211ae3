"""PEFT adapters in and out, with peft itself as the referee."""

import json
import shutil

import jax
import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

from derta_jax.config import MeshShape
from derta_jax.errors import UserError
from derta_jax.interop.hf_load import load_pretrained, read_model_config
from derta_jax.interop.peft import ADAPTER_CONFIG, ADAPTER_WEIGHTS, adapter_base, load_adapter, write_adapter
from derta_jax.models.lora import adapter_variables
from derta_jax.training.mesh import make_mesh
from tests.conftest import write_tiny_model
from tests.models.test_lora import random_adapter

FAMILIES = ("llama", "mistral", "mixtral", "qwen3")
TARGETS = {
    "llama": ["q_proj", "v_proj", "down_proj"],
    "mistral": ["k_proj", "o_proj", "gate_proj", "up_proj"],
    "mixtral": ["q_proj", "w1", "w2", "w3"],
    "qwen3": ["q_proj", "k_proj", "up_proj"],
}
TOKENS = np.random.default_rng(0).integers(3, 64, (2, 12))


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    base = tmp_path_factory.mktemp("bases")
    return {family: write_tiny_model(base / family, family, vocab_size=64) for family in FAMILIES}


def torch_logits(model):
    with torch.no_grad():
        return model.eval()(torch.tensor(TOKENS)).logits.numpy()


def our_logits(base, adapter):
    model, params = load_pretrained(base)
    variables = {"params": params} | adapter_variables({"default": adapter})
    return np.asarray(jax.jit(lambda: model.apply(variables, TOKENS))())


def write_with_peft(base, directory, targets, **options):
    """An adapter with random factors, as `save_pretrained` of peft writes it; returns peft's own logits."""
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM", **options)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(directory)
    return torch_logits(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_peft_loads_our_adapter_and_gives_the_same_logits(family, bases, tmp_path):
    config = read_model_config(bases[family])
    adapter = random_adapter(config)
    write_adapter(adapter, config, tmp_path, str(bases[family]), dropout=0.05)
    theirs = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(bases[family], dtype=torch.float32), tmp_path
    )
    np.testing.assert_allclose(our_logits(bases[family], adapter), torch_logits(theirs), rtol=0, atol=2e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("options", [{}, {"use_rslora": True}], ids=["", "rank-stabilised"])
def test_we_load_an_adapter_that_peft_wrote_and_give_the_same_logits(family, options, bases, tmp_path):
    expected = write_with_peft(bases[family], tmp_path, TARGETS[family], **options)
    adapter = load_adapter(tmp_path, read_model_config(bases[family]))
    np.testing.assert_allclose(our_logits(bases[family], adapter), expected, rtol=0, atol=2e-5)


def test_ranks_and_alphas_of_each_module_are_read_and_written(bases, tmp_path):
    options = {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"v_proj": 16, "down_proj": 3}}
    expected = write_with_peft(bases["llama"], tmp_path / "theirs", TARGETS["llama"], **options)
    config = read_model_config(bases["llama"])
    adapter = load_adapter(tmp_path / "theirs", config)
    assert adapter.scales == {"query": 2.0, "value": 8.0, "down": 0.75}
    (tmp_path / "ours").mkdir()
    write_adapter(adapter, config, tmp_path / "ours", str(bases["llama"]))
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(bases["llama"]), tmp_path / "ours")
    np.testing.assert_allclose(torch_logits(again), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_was_written_is_read_back_to_the_same_bits(family, bases, tmp_path):
    config = read_model_config(bases[family])
    adapter = random_adapter(config)
    write_adapter(adapter, config, tmp_path, "base")
    again = load_adapter(tmp_path, config)
    assert again.scales == adapter.scales
    jax.tree.map(np.testing.assert_array_equal, again.factors, dict(adapter.factors))
    assert adapter_base(tmp_path) == "base"


def test_an_adapter_lands_on_a_mesh(bases, tmp_path):
    config = read_model_config(bases["mixtral"])
    write_adapter(random_adapter(config), config, tmp_path, "base")
    spread = load_adapter(tmp_path, config, make_mesh(MeshShape(fsdp=2, expert=2, tensor=2)))
    jax.tree.map(np.testing.assert_array_equal, spread.factors, load_adapter(tmp_path, config).factors)
    gate = spread.factors["gate"]["a"]
    assert gate.addressable_shards[0].data.size * 8 == gate.size


@pytest.fixture
def written(bases, tmp_path):
    """An adapter of a Llama to break."""
    write_with_peft(bases["llama"], tmp_path, TARGETS["llama"])
    return tmp_path


def error_of(directory, bases):
    with pytest.raises(UserError) as error:
        load_adapter(directory, read_model_config(bases["llama"]))
    return str(error.value)


def change_config(directory, **changes):
    file = directory / ADAPTER_CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_every_tensor_and_setting_that_does_not_fit_is_listed(written, bases):
    tensors = load_file(written / ADAPTER_WEIGHTS)
    prefix = "base_model.model.model.layers"
    tensors[f"{prefix}.0.self_attn.q_porj.lora_A.weight"] = tensors.pop(f"{prefix}.0.self_attn.q_proj.lora_A.weight")
    tensors[f"{prefix}.1.mlp.down_proj.lora_B.weight"] = np.zeros((5, 4), np.float32)
    del tensors[f"{prefix}.1.self_attn.v_proj.lora_B.weight"]
    save_file(tensors, written / ADAPTER_WEIGHTS)
    change_config(written, use_dora=True, modules_to_save=["lm_head"], bias="all")
    first, *problems = error_of(written, bases).splitlines()
    assert first == f"the adapter in {written} does not fit a llama:"
    layers = "model.layers"
    assert sorted(problem.strip() for problem in problems) == [
        "bias: 'all' is not supported, only 'none'",
        f"missing {layers}.0.self_attn.q_proj.lora_A.weight [4, 32]",
        f"missing {layers}.1.self_attn.v_proj.lora_B.weight [16, 4]",
        f"{layers}.1.mlp.down_proj.lora_B.weight has shape [5, 4], expected [32, 4]",
        "modules_to_save: ['lm_head'] is not supported",
        f"unknown {layers}.0.self_attn.q_porj.lora_A.weight; did you mean '{layers}.0.self_attn.q_proj.lora_A.weight'?",
        "use_dora: True is not supported",
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type: 'IA3' is not supported, only 'LORA'"),
        ({"lora_alpha": None}, "lora_alpha must be a number (got None)"),
        ({"alpha_pattern": {r"layers\.0\.q_proj": 3}}, r"alpha_pattern: 'layers\\.0\\.q_proj' is not one of down_proj"),
    ],
)
def test_settings_that_are_not_supported_are_named(changes, message, written, bases):
    change_config(written, **changes)
    assert message in error_of(written, bases)


def test_an_adapter_of_another_architecture_is_refused(bases, tmp_path):
    write_with_peft(bases["mixtral"], tmp_path, ["w1", "w2", "w3"])
    assert "no tensor of an adapter" in error_of(tmp_path, bases)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: (d / ADAPTER_CONFIG).unlink(), f"{ADAPTER_CONFIG} is missing"),
        (lambda d: (d / ADAPTER_CONFIG).write_text("{"), "is not valid JSON"),
        (lambda d: (d / ADAPTER_CONFIG).write_text("[]"), "must hold a JSON object, not a list"),
        (lambda d: (d / ADAPTER_WEIGHTS).unlink(), f"{ADAPTER_WEIGHTS} is missing"),
        (
            lambda d: shutil.move(d / ADAPTER_WEIGHTS, d / "adapter_model.bin"),
            "pickled adapter (*.bin), which is never loaded",
        ),
        (lambda d: (d / ADAPTER_WEIGHTS).write_bytes(b"short"), "is not a whole safetensors file"),
    ],
    ids=["no config", "broken config", "list config", "no weights", "pickle", "truncated"],
)
def test_broken_files_are_named(spoil, message, written, bases):
    spoil(written)
    assert message in error_of(written, bases)


def test_a_config_that_names_no_base_is_refused(written):
    change_config(written, base_model_name_or_path=None)
    with pytest.raises(UserError, match="does not name its base_model_name_or_path"):
        adapter_base(written)
