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
from derta_jax.interop import tensor_files
from derta_jax.interop.hf_export import export_pretrained
from derta_jax.interop.hf_load import load_params, load_pretrained, open_weights, read_model_config
from derta_jax.models.params import leaves_with_rows
from derta_jax.models.params import row as row_of
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


def test_a_missing_shard_is_named_and_its_tensors_are_not(sharded):
    shard = sorted(sharded.glob("model-*.safetensors"))[1]
    shard.unlink()
    assert error_of(sharded).splitlines() == [
        f"the weights in {sharded} do not fit its config.json:",
        f"  {shard.name} is missing: model.safetensors.index.json names it",
    ]


def test_everything_that_is_wrong_is_listed_before_anything_is_on_a_device(sharded):
    missing, truncated, damaged, *_ = sorted(sharded.glob("model-*.safetensors"))
    missing.unlink()
    truncated.write_bytes(truncated.read_bytes()[:-1])
    tensors = load_file(damaged)
    name = next(name for name in tensors if name != QUERY)
    shape = list(tensors[name].shape)
    tensors[name] = tensors[name][:1]
    save_file(tensors | {"unheard.of": np.ones(1)}, damaged)
    file = sharded / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"]["unheard.of"] = damaged.name
    file.write_text(json.dumps(index))
    arrays = len(jax.live_arrays())
    problems = error_of(sharded).splitlines()[1:]
    assert len(jax.live_arrays()) == arrays
    assert problems == [
        f"  {missing.name} is missing: model.safetensors.index.json names it",
        f"  {truncated.name} is not a whole safetensors file: it is {truncated.stat().st_size:,} bytes long, "
        f"its header asks for {truncated.stat().st_size + 1:,}",
        f"  {name} has shape {[1, *shape[1:]]}, config.json asks for {shape}",
        "  unknown unheard.of",
    ]


@pytest.mark.parametrize("name", ["../elsewhere.safetensors", "/model.safetensors", 5])
def test_an_index_names_files_of_its_own_directory(sharded, name):
    file = sharded / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"][QUERY] = name
    file.write_text(json.dumps(index))
    assert error_of(sharded) == f"{file} has no weight_map of file names"


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
    first, problem = error_of(directory).splitlines()
    assert first == f"the weights in {directory} do not fit its config.json:"
    assert problem.startswith("  model.safetensors is not a whole safetensors file: it ")


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
@pytest.mark.parametrize("stored", [ml_dtypes.bfloat16, np.float16, np.float32, np.float64], ids="{0.__name__}".format)
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


def test_tensors_of_one_parameter_may_have_different_dtypes(directory, tiny_llama):
    other = QUERY.replace("layers.0", "layers.1")
    rewrite(directory, lambda tensors: tensors.update({QUERY: tensors[QUERY].astype(ml_dtypes.bfloat16)}))
    rewrite(directory, lambda tensors: tensors.update({other: tensors[other].astype(np.float64)}))
    expected = load_pretrained(tiny_llama)[1]["layers"]["query"]
    query = load_pretrained(directory)[1]["layers"]["query"]
    np.testing.assert_array_equal(query[0], expected[0].astype(jnp.bfloat16))
    np.testing.assert_array_equal(query[1], expected[1])


def test_bits_of_the_asked_for_dtype_are_not_touched(directory):
    bits = np.random.default_rng(0).integers(0, 2**16, (32, 32), dtype=np.uint16)

    def narrow(tensors):
        tensors.update({name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in tensors.items()})
        tensors[QUERY] = bits.view(ml_dtypes.bfloat16)

    rewrite(directory, narrow)
    _, params = load_pretrained(directory, "bfloat16")
    np.testing.assert_array_equal(np.asarray(params["layers"]["query"][0]).view(np.uint16), bits.T)


@pytest.mark.parametrize("block", [8 << 20, 100], ids=["large blocks", "small blocks"])
@pytest.mark.parametrize(
    ("family", "shape"),
    [
        ("llama", MeshShape(fsdp=8)),
        ("llama", MeshShape(data=2, fsdp=2, tensor=2)),
        ("mixtral", MeshShape(fsdp=8)),
        ("mixtral", MeshShape(fsdp=2, expert=2, tensor=2)),
        ("mixtral", MeshShape(data=2, fsdp=1, expert=4)),
    ],
    ids=str,
)
def test_loading_onto_a_mesh_gives_the_same_weights(request, family, shape, block, monkeypatch):
    directory = request.getfixturevalue(f"tiny_{family}")
    monkeypatch.setattr(tensor_files, "REQUEST_BYTES", block)
    mesh = make_mesh(shape)
    with jax.set_mesh(mesh):
        _, params = load_pretrained(directory, mesh=mesh)
    assert all(leaf.sharding.mesh == mesh for leaf in jax.tree.leaves(params))
    assert_same(params, load_pretrained(directory)[1])


def test_columns_that_several_devices_hold_are_read_together_where_rows_are_long(tmp_path):
    directory = write_tiny_model(tmp_path / "wide", vocab_size=64, hidden_size=8192, num_hidden_layers=1)
    _, params = load_pretrained(directory, mesh=make_mesh(MeshShape(data=2, fsdp=4)))
    assert_same(params, load_pretrained(directory)[1])


def test_every_tensor_of_a_mixture_lands_in_its_place(tiny_mixtral):
    tensors = load_file(tiny_mixtral / "model.safetensors")
    _, params = load_pretrained(tiny_mixtral)
    assert params["layers"]["gate"].shape == (2, 4, 32, 64)
    for layer, expert in np.ndindex(2, 4):
        for name, weight in (("gate", "w1"), ("down", "w2"), ("up", "w3")):
            stored = tensors[f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{weight}.weight"]
            np.testing.assert_array_equal(params["layers"][name][layer, expert], stored.T)


@pytest.mark.parametrize("shape", [None, MeshShape(data=4, fsdp=2)], ids=["one device", "with replicas"])
def test_progress_counts_every_byte_once(tiny_llama, shape):
    told = []
    config = read_model_config(tiny_llama)
    mesh = shape and make_mesh(shape)
    load_params(tiny_llama, config, "bfloat16", mesh, lambda done, total: told.append((done, total)))
    stored = sum(tensor.nbytes for tensor in load_file(tiny_llama / "model.safetensors").values())
    assert {total for _, total in told} == {stored}
    assert [done for done, _ in told] == sorted({done for done, _ in told})
    assert told[-1] == (stored, stored)


def test_a_mesh_that_does_not_fit_is_said_before_the_weights_are_looked_at(tiny_llama, tmp_path):
    config = read_model_config(tiny_llama)
    with pytest.raises(UserError, match="the mesh does not fit the model"):
        load_params(tmp_path, config, mesh=make_mesh(MeshShape(tensor=8)))


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_opened_weights_give_one_tensor_at_a_time(request, family):
    directory = request.getfixturevalue(f"tiny_{family}")
    config = read_model_config(directory)
    _, params = load_pretrained(directory)
    with open_weights(directory, config) as tensor_of:
        for row, array in leaves_with_rows(config, params):
            for index in row.hf_names(config):
                np.testing.assert_array_equal(tensor_of(row, index), array[index], strict=True)


def test_a_file_that_breaks_while_weights_are_read_is_a_users_matter(directory):
    config = read_model_config(directory)
    with open_weights(directory, config) as tensor_of:
        (directory / "model.safetensors").write_bytes(b"")
        with pytest.raises(UserError, match=f"cannot read the weights in {directory}: .* ends after"):
            tensor_of(row_of(config, "embed"), ())


def test_a_tied_checkpoint_may_hold_its_head_twice(tmp_path):
    directory = write_tiny_model(tmp_path / "tied", vocab_size=64, tie_word_embeddings=True)
    _, expected = load_pretrained(directory)
    rewrite(directory, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"]}))
    _, params = load_pretrained(directory)
    assert "head" not in params
    assert_same(params, expected)
