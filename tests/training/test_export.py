"""Models between their forms: runs, Hugging Face directories, adapters, checkpoints."""

import shutil

import fsspec
import jax
import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from derta_jax.config import load_config
from derta_jax.errors import UserError
from derta_jax.interop.hf_export import export_pretrained
from derta_jax.interop.hf_load import read_model_config
from derta_jax.interop.peft import adapter_base, write_adapter
from derta_jax.models.decoder import Decoder
from derta_jax.training.export import convert, export_model
from derta_jax.training.loop import train
from derta_jax.training.mesh import single_device_mesh
from derta_jax.training.restore import find_files, find_model, load_model
from tests.conftest import write_tiny_model
from tests.models.test_lora import random_adapter
from tests.training.conftest import losses_of, make_run_config

TOKENS = np.random.default_rng(0).integers(3, 300, (2, 12))


@pytest.fixture(scope="module", params=["tiny_llama", "tiny_mixtral"])
def directory(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def full(directory, example_rows, tmp_path_factory, console):
    config = make_run_config(directory, example_rows, tmp_path_factory.mktemp("full") / "run", train={"steps": 3})
    train(config, console)
    return config


@pytest.fixture(scope="module")
def lora(directory, example_rows, tmp_path_factory, console):
    sections = {"train": {"steps": 3, "learning_rate": 1e-2}, "lora": {"rank": 4, "alpha": 8}}
    config = make_run_config(directory, example_rows, tmp_path_factory.mktemp("lora") / "run", **sections)
    train(config, console)
    return config


def loaded(path, dtype="float32"):
    return load_model(find_model(path), dtype, single_device_mesh())


def torch_logits(model):
    with torch.no_grad():
        return model.eval()(torch.tensor(TOKENS)).logits.numpy()


def our_logits(path):
    model, params = Decoder(find_model(path).config), loaded(path)
    return np.asarray(jax.jit(lambda: model.apply({"params": params}, TOKENS))())


def test_an_exported_run_is_what_the_checkpoint_holds_to_the_bit(full, console, tmp_path):
    export_model(full.train.output, tmp_path / "out", console, max_shard_size="40KB")
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    jax.tree.map(np.testing.assert_array_equal, loaded(tmp_path / "out"), loaded(full.train.output))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    np.testing.assert_allclose(our_logits(full.train.output), torch_logits(theirs), rtol=0, atol=2e-5)


def test_a_checkpoint_is_chosen_by_its_step(full, console, tmp_path):
    export_model(full.train.output, tmp_path / "second", console, step=2)
    export_model(full.train.output, tmp_path / "last", console)
    second, last = (load_file(tmp_path / name / "model.safetensors") for name in ("second", "last"))
    assert any((second[name] != last[name]).any() for name in last)
    with pytest.raises(UserError, match=r"no checkpoint of step 9 in .*; there are: 2, 3"):
        export_model(full.train.output, tmp_path / "ninth", console, step=9)


def test_a_lora_run_becomes_an_adapter_that_peft_loads(lora, directory, console, tmp_path):
    export_model(lora.train.output, tmp_path / "out", console)
    base = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    assert np.abs(torch_logits(base) - our_logits(lora.train.output)).max() > 1e-3
    theirs = PeftModel.from_pretrained(base, tmp_path / "out")
    np.testing.assert_allclose(our_logits(lora.train.output), torch_logits(theirs), rtol=0, atol=2e-5)
    np.testing.assert_allclose(our_logits(tmp_path / "out"), our_logits(lora.train.output), rtol=0, atol=2e-6)
    assert AutoTokenizer.from_pretrained(tmp_path / "out")


def test_the_tokenizer_of_a_run_and_of_an_adapter_is_found_without_their_weights(lora, directory, console, tmp_path):
    export_model(lora.train.output, tmp_path / "out", console)
    shutil.copytree(lora.train.output, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    (tmp_path / "run" / "checkpoints").mkdir()
    assert find_files(tmp_path / "run") == tmp_path / "run" / "model"
    assert find_files(tmp_path / "out") == directory


def test_an_adapter_behind_a_url_is_merged_into_its_base(lora, console, tmp_path):
    export_model(lora.train.output, tmp_path / "out", console)
    url = f"memory://{tmp_path.name}/adapter"
    fsspec.filesystem("memory").put(str(tmp_path / "out"), url, recursive=True)
    np.testing.assert_allclose(our_logits(url), our_logits(lora.train.output), rtol=0, atol=2e-6)


def test_a_merged_export_is_a_whole_model(lora, console, tmp_path):
    export_model(lora.train.output, tmp_path / "out", console, merged=True)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    np.testing.assert_allclose(our_logits(lora.train.output), torch_logits(theirs), rtol=0, atol=2e-5)
    export_model(tmp_path / "out", tmp_path / "again", console)
    first, again = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "again"))
    for name in first:
        np.testing.assert_array_equal(first[name], again[name], err_msg=name)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "mistral", "mixtral", "qwen3"])
def test_a_merged_model_exported_again_has_the_same_bits(family, dtype, console, tmp_path):
    base = write_tiny_model(tmp_path / "base", family, vocab_size=64)
    config = read_model_config(base)
    (tmp_path / "adapter").mkdir()
    write_adapter(random_adapter(config), config, tmp_path / "adapter", str(base))
    export_model(tmp_path / "adapter", tmp_path / "merged", console, dtype=dtype, merged=True)
    merged, unmerged = loaded(tmp_path / "merged"), loaded(tmp_path / "adapter")
    closeness = 1e-6 if dtype == "float32" else 2**-8
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=closeness, atol=1e-7), merged, unmerged)
    export_pretrained(Decoder(config), loaded(tmp_path / "merged", dtype), tmp_path / "again", source=base)
    first, again = (load_file(tmp_path / name / "model.safetensors") for name in ("merged", "again"))
    assert first.keys() == again.keys()
    for name, tensor in first.items():
        np.testing.assert_array_equal(tensor, again[name], err_msg=name)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_converted_to_a_checkpoint_and_back_has_the_same_bits(directory, dtype, console, tmp_path):
    convert(directory, tmp_path / "checkpoint", console, dtype)
    convert(tmp_path / "checkpoint", tmp_path / "back", console, dtype)
    jax.tree.map(np.testing.assert_array_equal, loaded(tmp_path / "checkpoint", dtype), loaded(directory, dtype))
    stored, back = (load_file(place / "model.safetensors") for place in (directory, tmp_path / "back"))
    assert stored.keys() == back.keys()
    for name, tensor in back.items():
        np.testing.assert_array_equal(tensor, stored[name].astype(tensor.dtype), err_msg=name)
    assert {tensor.dtype.name for tensor in back.values()} == {dtype}


def test_a_converted_model_is_trained_like_the_original(tiny_llama, run_config, console, tmp_path):
    convert(tiny_llama, tmp_path / "checkpoint", console)
    places = {"original": tiny_llama, "converted": tmp_path / "checkpoint"}
    runs = [run_config(name, model={"path": str(path)}, train={"steps": 2}) for name, path in places.items()]
    for run in runs:
        train(run, console)
    assert losses_of(runs[0]) == losses_of(runs[1])


def test_an_export_tells_where_it_comes_from(lora, directory, console, tmp_path):
    export_model(lora.train.output, tmp_path / "out", console)
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: peft\n")
    assert "| recipe | derta |" in card
    assert "| checkpoint | step 3 |" in card
    assert "content hash `" in card
    assert "rank 4, alpha 8, dropout 0.05 on every linear layer" in card
    assert "| loss | " in card
    assert f"derta export {lora.train.output} out --step 3" in card
    assert load_config(tmp_path / "out" / "derta_config.yaml") == lora


def test_an_adapter_on_what_peft_cannot_load_wants_a_name_for_it(run_config, tiny_llama, console, tmp_path):
    convert(tiny_llama, tmp_path / "checkpoint", console)
    config = run_config(model={"path": str(tmp_path / "checkpoint")}, train={"steps": 1}, lora={"rank": 2})
    train(config, console)
    with pytest.raises(UserError, match=r"which is a checkpoint, and which peft could not load: export it --merged"):
        export_model(config.train.output, tmp_path / "out", console)
    export_model(config.train.output, tmp_path / "out", console, base_name=str(tiny_llama))
    assert PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama), tmp_path / "out")
    np.testing.assert_allclose(our_logits(tmp_path / "out"), our_logits(config.train.output), rtol=0, atol=2e-6)


def test_a_card_links_a_base_that_is_on_the_hub(lora, console, tmp_path):
    export_model(lora.train.output, tmp_path / "out", console, base_name="someone/tiny")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "\nbase_model: someone/tiny\n" in card
    assert "--step 3 --base someone/tiny" in card
    assert adapter_base(tmp_path / "out") == "someone/tiny"


def test_a_base_that_is_gone_is_named(run_config, tiny_llama, console, tmp_path):
    convert(tiny_llama, tmp_path / "ckpt", console)
    config = run_config(model={"path": str(tmp_path / "ckpt")}, train={"steps": 1}, lora={"rank": 2})
    train(config, console)
    (tmp_path / "ckpt").rename(tmp_path / "moved")
    with pytest.raises(UserError, match=f"{tmp_path / 'ckpt'} is no model"):
        export_model(config.train.output, tmp_path / "out", console)


@pytest.mark.parametrize("to", [export_model, convert])
def test_a_place_that_is_taken_is_refused(to, full, console, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("")
    with pytest.raises(UserError, match="already exists"):
        to(full.train.output, tmp_path / "out", console)
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["mine.txt"]
