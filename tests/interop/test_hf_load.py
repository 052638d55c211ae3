"""Hugging Face directories, whole and broken, into parameters."""

import json
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from derta_jax.config import MeshShape
from derta_jax.errors import UserError
from derta_jax.interop.hf_export import export_pretrained
from derta_jax.interop.hf_load import load_pretrained, read_model_config
from derta_jax.training.mesh import make_mesh
from tests.conftest import write_tiny_model

QUERY = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def directory(tiny_llama, tmp_path):
    """A copy to break."""
    return shutil.copytree(tiny_llama, tmp_path / "model")


@pytest.fixture
def sharded(tiny_llama, tmp_path):
    model, params = load_pretrained(tiny_llama)
    export_pretrained(model, params, tmp_path / "sharded", source=tiny_llama, max_shard_size="30KB")
    return tmp_path / "sharded"


def rewrite(directory, change):
    """Apply `change` to the dict of tensors on disk."""
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, directory / "model.safetensors")


def assert_same(params, others):
    jax.tree.map(np.testing.assert_array_equal, params, others)


def error_of(directory, **options):
    with pytest.raises(UserError) as error:
        load_pretrained(directory, **options)
    return str(error.value)


def test_missing_unknown_and_misshapen_tensors_are_listed_together(directory):
    def spoil(tensors):
        tensors["model.layers.0.self_attn.q_porj.weight"] = tensors.pop(QUERY)
        tensors["model.norm.weight"] = tensors["model.norm.weight"][:5]
        del tensors["lm_head.weight"]

    vocabulary = read_model_config(directory).vocab_size
    rewrite(directory, spoil)
    first, *problems = error_of(directory).splitlines()
    assert first == f"the weights in {directory} do not fit its config.json:"
    assert sorted(problem.strip() for problem in problems) == [
        f"missing lm_head.weight [{vocabulary}, 32]",
        f"missing {QUERY} [32, 32]",
        "model.norm.weight has shape [5], config.json asks for [32]",
        f"unknown model.layers.0.self_attn.q_porj.weight; did you mean '{QUERY}'?",
    ]


def test_layers_beyond_those_of_the_config_are_unknown(directory):
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    assert error_of(directory).count("unknown model.layers.1.") == 9


def test_integers_are_not_weights(directory):
    rewrite(directory, lambda tensors: tensors.update({QUERY: tensors[QUERY].astype(np.int8)}))
    assert f"{QUERY} has dtype I8; supported: F32, F16, BF16, F64" in error_of(directory)


def test_rotary_buffers_of_old_checkpoints_are_passed_over(directory, tiny_llama):
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
    rewrite(directory, lambda tensors: tensors.update(buffer))
    assert_same(load_pretrained(directory)[1], load_pretrained(tiny_llama)[1])


def test_several_shards_load_like_one_file(sharded, tiny_llama):
    assert len(list(sharded.glob("model-*.safetensors"))) > 1
    assert_same(load_pretrained(sharded)[1], load_pretrained(tiny_llama)[1])


def test_a_missing_shard_is_named(sharded):
    shard = sorted(sharded.glob("model-*.safetensors"))[1]
    shard.unlink()
    assert error_of(sharded) == f"{sharded} lacks {shard.name}, which model.safetensors.index.json names"


def test_a_tensor_that_the_index_puts_in_the_wrong_shard_is_named(sharded):
    file = sharded / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    wrong = next(shard for shard in index["weight_map"].values() if shard != index["weight_map"][QUERY])
    index["weight_map"][QUERY] = wrong
    file.write_text(json.dumps(index))
    assert f"missing {QUERY}: the index says {wrong}, which does not hold it" in error_of(sharded)


@pytest.mark.parametrize(("text", "message"), [("{", "is not valid JSON"), ("{}", "has no weight_map")])
def test_a_broken_index_is_named(sharded, text, message):
    file = sharded / "model.safetensors.index.json"
    file.write_text(text)
    assert error_of(sharded).startswith(f"{file} {message}")


@pytest.mark.parametrize("length", [0, 100, 10_000])
def test_a_truncated_file_is_named(directory, length):
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:length])
    assert error_of(directory).startswith(f"{file} is not a whole safetensors file: ")


def test_pickled_weights_are_refused(directory):
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    assert "pickled weights (*.bin), which are never loaded" in error_of(directory)


def test_a_directory_without_weights_says_what_was_looked_for(directory):
    (directory / "model.safetensors").unlink()
    message = error_of(directory)
    assert message == f"no weights in {directory}: neither model.safetensors nor model.safetensors.index.json"


def test_a_directory_without_a_config_is_no_model(tmp_path):
    assert error_of(tmp_path) == f"no model in {tmp_path}: config.json is missing"


@pytest.mark.parametrize(
    ("text", "message"), [("not json", "is not valid JSON"), ("[]", "must hold a JSON object, not a list")]
)
def test_a_config_that_is_no_json_object_is_named(directory, text, message):
    (directory / "config.json").write_text(text)
    with pytest.raises(UserError, match=message) as error:
        read_model_config(directory)
    assert str(error.value).startswith(str(directory / "config.json"))


@pytest.mark.parametrize("wanted", ["float32", "bfloat16"])
@pytest.mark.parametrize("stored", [ml_dtypes.bfloat16, np.float16, np.float32], ids=["bf16", "f16", "f32"])
def test_weights_of_any_float_are_loaded_in_the_dtype_asked_for(directory, stored, wanted):
    def narrow(tensors):
        tensors.update({name: tensor.astype(stored) for name, tensor in tensors.items()})

    original = load_file(directory / "model.safetensors")[QUERY]
    rewrite(directory, narrow)
    model, params = load_pretrained(directory, wanted)
    assert model.dtype == jnp.dtype(wanted)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(wanted)}
    expected = original.astype(stored).astype(jnp.dtype(wanted)).T
    np.testing.assert_array_equal(params["layers"]["query"][0], expected)


@pytest.mark.parametrize(
    "shape", [MeshShape(fsdp=8), MeshShape(data=2, fsdp=2, tensor=2)], ids=["fsdp 8", "data 2 × fsdp 2 × tensor 2"]
)
def test_loading_onto_a_mesh_gives_the_same_weights(tiny_llama, shape):
    _, params = load_pretrained(tiny_llama, mesh=make_mesh(shape))
    assert all(len(leaf.sharding.device_set) == 8 for leaf in jax.tree.leaves(params))
    assert_same(params, load_pretrained(tiny_llama)[1])


def test_a_tied_checkpoint_may_hold_its_head_twice(tmp_path):
    directory = write_tiny_model(tmp_path / "tied", vocab_size=64, tie_word_embeddings=True)
    _, expected = load_pretrained(directory)
    rewrite(directory, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"]}))
    _, params = load_pretrained(directory)
    assert "head" not in params
    assert_same(params, expected)
