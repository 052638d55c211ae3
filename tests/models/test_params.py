"""The parameter table: complete, without duplicates, and invertible."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

from derta_jax.interop.hf_export import export_pretrained
from derta_jax.interop.hf_load import load_pretrained, read_model_config
from derta_jax.models.decoder import Decoder, head_matrix
from derta_jax.models.params import count_parameters, parameter_table
from tests.conftest import write_tiny_model


@pytest.fixture(scope="module", params=["llama", "llama-tied", "mistral", "mistral-tied", "mixtral", "qwen3"])
def directory(request, tmp_path_factory):
    family, _, tied = request.param.partition("-")
    path = tmp_path_factory.mktemp("params") / request.param
    return write_tiny_model(path, family, vocab_size=64, tie_word_embeddings=bool(tied))


def flat_shapes(model):
    tokens = jax.ShapeDtypeStruct((1, 4), jnp.int32)
    variables = jax.eval_shape(model.init, jax.random.key(0), tokens)
    assert list(variables) == ["params"]
    return {path: leaf.shape for path, leaf in traverse_util.flatten_dict(variables["params"], sep="/").items()}


def test_the_table_covers_exactly_what_the_model_makes(directory):
    config = read_model_config(directory)
    assert {row.path: row.shape(config) for row in parameter_table(config)} == flat_shapes(Decoder(config))


def names_and_shapes(config):
    return [(name, row.hf_shape(config)) for row in parameter_table(config) for name in row.hf_names(config).values()]


def test_the_table_names_exactly_the_tensors_that_transformers_writes(directory):
    written = load_file(directory / "model.safetensors")
    expected = sorted((name, tensor.shape) for name, tensor in written.items())
    assert sorted(names_and_shapes(read_model_config(directory))) == expected


def test_parameters_are_counted_as_transformers_counts_them(directory):
    referee = AutoModelForCausalLM.from_pretrained(directory)
    assert count_parameters(read_model_config(directory)) == referee.num_parameters()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loading_what_was_exported_gives_the_same_bits(directory, dtype, tmp_path):
    model, params = load_pretrained(directory, dtype)
    export_pretrained(model, params, tmp_path / "exported", source=directory)
    again, reloaded = load_pretrained(tmp_path / "exported", dtype)
    assert again == model
    jax.tree.map(np.testing.assert_array_equal, reloaded, params)
    assert {leaf.dtype for leaf in jax.tree.leaves(reloaded)} == {jnp.dtype(dtype)}


def test_adapters_go_on_every_matrix_inside_the_layers(directory):
    config = read_model_config(directory)
    targets = {row.hf_module for row in parameter_table(config) if row.lora}
    feed_forward = {"w1", "w2", "w3"} if config.experts else {"gate_proj", "up_proj", "down_proj"}
    assert targets == {"q_proj", "k_proj", "v_proj", "o_proj"} | feed_forward


def test_a_tied_head_is_the_embedding_turned(directory):
    model, params = load_pretrained(directory)
    assert head_matrix(params).shape == (model.config.embed_dim, model.config.vocab_size)
    assert ("head" in params) == (not model.config.tied_head)
    if model.config.tied_head:
        np.testing.assert_array_equal(head_matrix(params), params["embed"].T)
