"""Parameters into directories that transformers loads."""

import functools
import json
import resource
import shutil
import weakref
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from derta_jax import export_pretrained, load_pretrained
from derta_jax.config import MeshShape
from derta_jax.errors import UserError
from derta_jax.interop import hf_export
from derta_jax.interop.hf_export import fetch_tensor, gather_tensor, parse_size, write_model
from derta_jax.models.params import leaves_with_rows
from derta_jax.training.mesh import make_mesh
from tests.conftest import write_tiny_model, write_tokenizer

TOKENS = np.random.default_rng(0).integers(3, 64, (2, 12))
CHAT = "{% for message in messages %}<{{ message.content }}>{% endfor %}"


@pytest.fixture(scope="module", params=["llama", "llama-tied", "mistral"])
def source(request, tmp_path_factory):
    family, _, tied = request.param.partition("-")
    path = tmp_path_factory.mktemp("source") / request.param
    return write_tiny_model(path, family, vocab_size=64, tie_word_embeddings=bool(tied))


@pytest.fixture
def small(tiny_llama):
    return load_pretrained(tiny_llama)


@functools.partial(jax.jit, static_argnums=0)
def apply(model, params):
    return model.apply({"params": params}, TOKENS)


def tensors_of(directory):
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("copied", [True, False], ids=["the original's config", "a config of our own"])
def test_transformers_loads_the_export_and_computes_the_same_logits(source, copied, tmp_path):
    model, params = load_pretrained(source)
    changed = jax.tree.map(lambda leaf: leaf * 0.9, params)
    export_pretrained(model, changed, tmp_path / "out", source=source if copied else None)
    referee = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert referee.dtype == torch.float32
    with torch.no_grad():
        expected = referee(torch.tensor(TOKENS)).logits.numpy()
    logits = apply(model, changed)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=2e-5)


def tied(family):
    return {"tie_word_embeddings": True} if family.endswith("tied") else {}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "llama-tied", "mistral", "mixtral"])
def test_what_is_loaded_and_exported_is_what_was_stored_bit_by_bit(family, dtype, tmp_path):
    source = write_tiny_model(
        tmp_path / "source", family.removesuffix("-tied"), vocab_size=64, dtype=dtype, **tied(family)
    )
    export_pretrained(*load_pretrained(source, dtype), tmp_path / "out", source=source, max_shard_size="50KB")
    stored, exported = tensors_of(source), tensors_of(tmp_path / "out")
    assert exported.keys() == stored.keys()
    for name, tensor in stored.items():
        assert tensor.dtype == jnp.dtype(dtype)
        np.testing.assert_array_equal(exported[name], tensor, strict=True)


def test_transformers_loads_a_mixture(tiny_mixtral, tmp_path):
    export_pretrained(*load_pretrained(tiny_mixtral), tmp_path / "out", source=tiny_mixtral)
    theirs, ours = (AutoModelForCausalLM.from_pretrained(path) for path in (tiny_mixtral, tmp_path / "out"))
    for (name, expected), (other, actual) in zip(theirs.state_dict().items(), ours.state_dict().items(), strict=True):
        assert name == other
        assert torch.equal(actual, expected)
    assert "model.layers.1.block_sparse_moe.experts.3.w2.weight" in tensors_of(tmp_path / "out")


@pytest.mark.parametrize("block", [4 << 20, 100], ids=["large blocks", "small blocks"])
@pytest.mark.parametrize("shape", [MeshShape(fsdp=2, expert=2, tensor=2), MeshShape(data=2, fsdp=1, expert=4)], ids=str)
def test_tensors_are_gathered_from_all_devices(tiny_mixtral, shape, block, monkeypatch):
    monkeypatch.setattr(hf_export, "BLOCK_BYTES", block)
    model, params = load_pretrained(tiny_mixtral, "bfloat16", make_mesh(shape))
    _, expected = load_pretrained(tiny_mixtral, "bfloat16")
    for (row, array), (_, whole) in zip(
        leaves_with_rows(model.config, params), leaves_with_rows(model.config, expected), strict=True
    ):
        index = list(row.hf_names(model.config))[-1]
        for gathered in (gather_tensor(array, index), fetch_tensor(array, index)):
            np.testing.assert_array_equal(gathered, whole[index], strict=True)


@pytest.fixture
def recorded(small):
    """Makes the tensors of a model, and notes which was asked for while another was still in memory."""
    model, params = small
    arrays = {row.path: np.asarray(array) for row, array in leaves_with_rows(model.config, params)}
    made: list[weakref.ref] = []
    together: list[str] = []

    def tensor_of(row, index):
        together.extend(row.path for other in made if other() is not None)
        tensor = arrays[row.path][index].copy()
        made.append(weakref.ref(tensor))
        return tensor

    return model.config, tensor_of, together


def test_one_tensor_is_in_memory_at_a_time(recorded, small, tmp_path):
    config, tensor_of, together = recorded
    write_model(config, tensor_of, tmp_path / "streamed", None, "float32", 60_000)
    assert not together
    export_pretrained(*small, tmp_path / "whole", max_shard_size="60KB")
    for file in (tmp_path / "whole").iterdir():
        assert file.read_bytes() == (tmp_path / "streamed" / file.name).read_bytes()


def test_progress_ends_with_every_byte_written(small, tmp_path):
    told = []
    export_pretrained(*small, tmp_path / "out", progress=lambda done, total: told.append((done, total)))
    written = sum(tensor.nbytes for tensor in tensors_of(tmp_path / "out").values())
    assert told[-1] == (written, written)
    assert len(told) == len(tensors_of(tmp_path / "out"))


def test_texts_are_written_beside_the_weights(small, tmp_path):
    export_pretrained(*small, tmp_path / "out", extra_files={"README.md": "# Café\n"})
    assert (tmp_path / "out" / "README.md").read_text(encoding="utf-8") == "# Café\n"


@pytest.mark.parametrize("url", ["gs://bucket/model", Path("gs://bucket/model")], ids=["text", "path"])
def test_a_url_is_not_a_place_to_export_to(small, url):
    with pytest.raises(UserError, match=r"cannot write to gs:/+bucket/model: choose a local directory"):
        export_pretrained(*small, url)


def test_a_failure_leaves_nothing_behind(small, tmp_path):
    model, _ = small

    def tensor_of(row, index):
        raise UserError("this checkpoint is broken")

    with pytest.raises(UserError, match="this checkpoint is broken"):
        write_model(model.config, tensor_of, tmp_path / "out", None, "float32", 1000)
    assert not list(tmp_path.iterdir())


def test_a_disk_that_takes_no_more_is_named_and_nothing_stays_on_it(small, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
        with pytest.raises(UserError, match=f"cannot write {tmp_path / 'out'}: File too large"):
            export_pretrained(*small, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


def test_sharded_parameters_export_like_those_of_one_device(tiny_llama, tmp_path):
    for name, mesh in {"one": None, "eight": make_mesh(MeshShape(data=2, fsdp=2, tensor=2))}.items():
        export_pretrained(*load_pretrained(tiny_llama, mesh=mesh), tmp_path / name, source=tiny_llama)
    one, eight = (tmp_path / name / "model.safetensors" for name in ("one", "eight"))
    assert one.read_bytes() == eight.read_bytes()


def test_everything_but_the_weights_is_copied(tmp_path):
    source = tmp_path / "source"
    size = write_tokenizer_with_chat(source)
    write_tiny_model(source, vocab_size=size)
    (source / "generation_config.json").write_text('{"eos_token_id": [2, 5], "temperature": 0.6}')
    export_pretrained(*load_pretrained(source), tmp_path / "out", source=source)
    assert {file.name for file in (tmp_path / "out").iterdir()} == {file.name for file in source.iterdir()}
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "<hi>"


def write_tokenizer_with_chat(directory):
    return -(-write_tokenizer(directory, CHAT) // 8) * 8


def test_the_config_keeps_keys_that_we_do_not_know(tiny_llama, small, tmp_path):
    source = shutil.copytree(tiny_llama, tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"somebody_elses": [1, 2]}))
    export_pretrained(*small, tmp_path / "out", source=source)
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == config | {"somebody_elses": [1, 2]}


@pytest.mark.parametrize("held", ["float32", "bfloat16"])
@pytest.mark.parametrize("asked", [None, "float32", "bfloat16"])
def test_the_dtype_is_the_parameters_own_unless_another_is_asked_for(tiny_llama, held, asked, tmp_path):
    model, params = load_pretrained(tiny_llama, held)
    export_pretrained(model, params, tmp_path / "out", source=tiny_llama, dtype=asked)
    written = asked or held
    assert {tensor.dtype for tensor in tensors_of(tmp_path / "out").values()} == {jnp.dtype(written)}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == written


def test_an_old_torch_dtype_gives_way_to_the_dtype_written(tiny_llama, small, tmp_path):
    source = shutil.copytree(tiny_llama, tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    del config["dtype"]
    (source / "config.json").write_text(json.dumps(config | {"torch_dtype": "float16"}))
    export_pretrained(*small, tmp_path / "out", source=source, dtype="bfloat16")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (written["dtype"], "torch_dtype" in written) == ("bfloat16", False)


def test_rounding_to_bfloat16_is_to_the_nearest(small, tmp_path):
    model, params = small
    export_pretrained(model, params, tmp_path / "out", dtype="bfloat16")
    expected = np.asarray(params["embed"]).astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(tensors_of(tmp_path / "out")["model.embed_tokens.weight"], expected)


def test_shards_stay_under_the_size_and_the_index_says_what_is_where(tiny_llama, small, tmp_path):
    export_pretrained(*small, tmp_path / "out", source=tiny_llama, max_shard_size="60KB")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    shards = {file.name: load_file(file) for file in (tmp_path / "out").glob("*.safetensors")}
    count = len(shards)
    assert sorted(shards) == [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
    assert count > 1
    held = {name: shard for shard, tensors in shards.items() for name in tensors}
    assert index["weight_map"] == held
    sizes = [sum(tensor.nbytes for tensor in tensors.values()) for tensors in shards.values()]
    assert max(sizes) <= 60_000
    assert index["metadata"]["total_size"] == sum(sizes)


def test_a_tensor_larger_than_a_shard_has_one_of_its_own(small, tmp_path):
    export_pretrained(*small, tmp_path / "out", max_shard_size="1B")
    files = list((tmp_path / "out").glob("*.safetensors"))
    assert [len(load_file(file)) for file in files] == [1] * len(files)


def test_transformers_loads_shards(tiny_llama, small, tmp_path):
    export_pretrained(*small, tmp_path / "out", source=tiny_llama, max_shard_size="60KB")
    whole, shards = (AutoModelForCausalLM.from_pretrained(path) for path in (tiny_llama, tmp_path / "out"))
    for (name, expected), (other, actual) in zip(whole.state_dict().items(), shards.state_dict().items(), strict=True):
        assert name == other
        assert torch.equal(actual, expected)


def test_an_existing_directory_is_refused_and_left_alone(small, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="already exists: choose another directory, or remove it first"):
        export_pretrained(*small, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


def test_a_file_in_the_place_of_the_directory_is_refused(small, tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(UserError, match="already exists"):
        export_pretrained(*small, tmp_path / "out")


def test_an_empty_directory_may_be_there_already(small, tmp_path):
    (tmp_path / "out").mkdir()
    export_pretrained(*small, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_directories_on_the_way_are_made(small, tmp_path):
    export_pretrained(*small, tmp_path / "a" / "b")
    assert [file.name for file in (tmp_path / "a").iterdir()] == ["b"]


def test_a_source_without_a_config_is_refused_and_nothing_is_left_behind(small, tmp_path):
    (tmp_path / "source").mkdir()
    with pytest.raises(UserError, match=r"source to copy from: config\.json is missing"):
        export_pretrained(*small, tmp_path / "out", source=tmp_path / "source")
    assert [file.name for file in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("spoiled", ["embed", "head"])
def test_nothing_is_left_behind_when_writing_fails(small, spoiled, tmp_path):
    model, params = small
    with pytest.raises(KeyError, match=spoiled):
        export_pretrained(model, {key: params[key] for key in params if key != spoiled}, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_is_named(small, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*file/out: Not a directory"):
        export_pretrained(*small, tmp_path / "file" / "out")


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("5GB", 5_000_000_000),
        ("200MB", 200_000_000),
        ("1.5 kB", 1500),
        ("1GiB", 2**30),
        ("2KiB", 2048),
        ("3T", 3 * 10**12),
        ("77", 77),
        ("77B", 77),
    ],
)
def test_sizes_are_powers_of_ten_or_with_an_i_of_two(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "5 potatoes", "-1GB", "5XB"])
def test_what_is_no_size_is_said_so(text):
    with pytest.raises(UserError, match=f"size '{text}' is not like 5GB or 200MB"):
        parse_size(text)


def test_a_wrong_size_leaves_nothing_behind(small, tmp_path):
    with pytest.raises(UserError, match="is not like 5GB"):
        export_pretrained(*small, tmp_path / "out", max_shard_size="big")
    assert not list(tmp_path.iterdir())
