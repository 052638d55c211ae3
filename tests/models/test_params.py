"""The parameter table: complete, without duplicates, and invertible."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from transformers import AutoModelForCausalLM

from derta_jax.interop.hf_export import export_pretrained
from derta_jax.interop.hf_load import load_pretrained, read_model_config
from derta_jax.models.decoder import Decoder, head_matrix
from derta_jax.models.params import count_parameters, parameter_table
from tests.conftest import write_tiny_model


@pytest.fixture(scope="module", params=["llama", "llama-tied", "mistral", "mistral-tied"])
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


def test_the_table_names_exactly_the_tensors_of_transformers(directory):
    config = read_model_config(directory)
    ours = [(name, row.hf_shape(config)) for row in parameter_table(config) for name in row.hf_names(config)]
    referee = AutoModelForCausalLM.from_pretrained(directory)
    assert sorted(ours) == sorted((name, tuple(tensor.shape)) for name, tensor in referee.named_parameters())


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
    rows = parameter_table(read_model_config(directory))
    targets = {row.hf_name.split(".")[-2] for row in rows if row.lora}
    assert targets == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_a_tied_head_is_the_embedding_turned(directory):
    model, params = load_pretrained(directory)
    assert head_matrix(params).shape == (model.config.embed_dim, model.config.vocab_size)
    assert ("head" in params) == (not model.config.tied_head)
    if model.config.tied_head:
        np.testing.assert_array_equal(head_matrix(params), params["embed"].T)
