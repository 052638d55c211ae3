"""Models that are not in a local directory: behind URLs, and on the Hugging Face hub."""

import contextlib
import fnmatch
import http.server
import shutil
import sys
import threading

import fsspec
import huggingface_hub
import jax
import numpy as np
import pytest

from derta_jax.config import MeshShape
from derta_jax.errors import UserError
from derta_jax.interop.hf_export import copy_model_files, export_pretrained
from derta_jax.interop.hf_load import check_weights, load_pretrained, read_model_config
from derta_jax.interop.source import local_files, weights_place
from derta_jax.interop.tokenizer import load_tokenizer
from derta_jax.training.mesh import make_mesh

SMALL = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}


@pytest.fixture
def url(tiny_llama, tmp_path):
    """The tiny model behind a URL, as one file."""
    return upload(tiny_llama, f"memory://{tmp_path.name}/model")


@pytest.fixture
def hub_cache(tiny_llama, tmp_path, monkeypatch):
    """A hub cache that holds the tiny model as `someone/tiny`."""
    cache = tmp_path / "hub"
    model = cache / "models--someone--tiny"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text("0" * 40)
    shutil.copytree(tiny_llama, model / "snapshots" / ("0" * 40))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    return cache


@pytest.fixture
def hub(hub_cache, monkeypatch):
    """A hub on this machine that answers everything in the same way: `hub(status, headers)`."""
    with contextlib.ExitStack() as running:

        def answer(status, headers):
            class Handler(http.server.BaseHTTPRequestHandler):
                def do_GET(self):
                    self.send_response(status)
                    for name, value in ({"Content-Length": "0"} | headers).items():
                        self.send_header(name, value)
                    self.end_headers()

                def log_message(self, *_):
                    pass

            server = running.enter_context(http.server.ThreadingHTTPServer(("localhost", 0), Handler))
            threading.Thread(target=server.serve_forever).start()
            running.callback(server.shutdown)
            monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://localhost:{server.server_port}")
            monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)

        yield answer


def upload(directory, url):
    for file in directory.iterdir():
        with fsspec.open(f"{url}/{file.name}", "wb") as stream:
            stream.write(file.read_bytes())
    return url


def assert_same(params, others):
    jax.tree.map(np.testing.assert_array_equal, params, others)


def error_of(path):
    with pytest.raises(UserError) as error:
        load_pretrained(path)
    return str(error.value)


def test_a_local_directory_is_its_own_files(tiny_llama):
    assert local_files(str(tiny_llama)) == local_files(tiny_llama) == weights_place(tiny_llama) == tiny_llama


def test_a_directory_that_is_not_there_holds_no_model(tmp_path):
    assert error_of(tmp_path / "nowhere") == f"no model in {tmp_path / 'nowhere'}: config.json is missing"


def test_of_a_url_everything_but_the_weights_is_copied_once(url, tiny_llama):
    files = local_files(url)
    assert {file.name for file in files.iterdir()} == SMALL
    assert all((files / name).read_bytes() == (tiny_llama / name).read_bytes() for name in SMALL)
    assert local_files(f"{url}/") == files
    load_tokenizer(files)


def test_files_are_copied_from_a_url(url, tmp_path):
    copy_model_files(url, tmp_path / "copy")
    assert {file.name for file in (tmp_path / "copy").iterdir()} == SMALL


def test_a_model_behind_a_url_loads_like_one_on_disk(url, tiny_llama):
    model, params = load_pretrained(url)
    assert model.config == read_model_config(tiny_llama)
    assert_same(params, load_pretrained(tiny_llama)[1])


def test_shards_behind_a_url_load_onto_a_mesh(tiny_llama, tmp_path):
    expected = load_pretrained(tiny_llama)
    export_pretrained(*expected, tmp_path / "shards", source=tiny_llama, max_shard_size="30KB")
    url = upload(tmp_path / "shards", f"memory://{tmp_path.name}/shards")
    _, params = load_pretrained(url, mesh=make_mesh(MeshShape(data=2, fsdp=2, tensor=2)))
    assert_same(params, expected[1])


def test_what_is_wrong_behind_a_url_is_named_by_the_url(url):
    files = fsspec.filesystem("memory")
    name = f"{url.removeprefix('memory:/')}/model.safetensors"
    files.pipe(name, files.cat(name)[:-1])
    assert error_of(url).startswith(
        f"the weights in {url} do not fit its config.json:\n  model.safetensors is not a whole safetensors file: it is "
    )
    files.rm(name)
    assert error_of(url) == f"no weights in {url}: neither model.safetensors nor model.safetensors.index.json"
    files.pipe(name.replace("model.safetensors", "pytorch_model.bin"), b"pickle")
    assert "pickled weights (*.bin), which are never loaded" in error_of(url)


def test_a_url_with_nothing_behind_it_holds_no_model():
    assert error_of("memory://nothing/here") == "no model in memory://nothing/here: config.json is missing"


def test_a_url_of_an_unknown_kind_is_named():
    assert error_of("carrier-pigeon://loft/model").startswith("cannot read carrier-pigeon://loft/model: ")


def test_google_storage_without_its_library_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    assert error_of("gs://bucket/model").endswith("pip install 'derta-jax[gcs]'")


def test_a_hub_id_that_is_in_the_cache_loads_without_a_network(hub_cache, tiny_llama):
    files = local_files("someone/tiny")
    assert files == hub_cache / "models--someone--tiny" / "snapshots" / ("0" * 40)
    config = read_model_config("someone/tiny")
    assert check_weights("someone/tiny", config).keys() == check_weights(tiny_llama, config).keys()
    assert_same(load_pretrained("someone/tiny")[1], load_pretrained(tiny_llama)[1])


def test_a_local_directory_comes_before_a_hub_id(hub_cache, tiny_llama, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_llama, tmp_path / "someone" / "tiny")
    assert str(local_files("someone/tiny")) == "someone/tiny"


def test_without_a_network_a_hub_id_that_is_not_in_the_cache_is_a_users_mistake(hub_cache):
    assert error_of("someone/absent") == (
        "someone/absent is neither a local directory nor whole in the local cache of the Hugging Face hub, and "
        "HF_HUB_OFFLINE is set: fetch it where there is a network with `hf download`, or give a directory"
    )


def test_a_hub_that_cannot_be_reached_is_named(hub_cache, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://localhost:1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    assert "and the hub cannot be reached (" in error_of("someone/unreachable")


@pytest.mark.parametrize(
    ("name", "status", "code", "message"),
    [
        ("someone/misspelt", 404, "RepoNotFound", "neither a local directory nor a model on the Hugging Face hub"),
        ("someone/private", 401, "", "log in with `hf auth login` or set HF_TOKEN"),
        ("someone/gated", 403, "GatedRepo", "is gated on the Hugging Face hub: accept its terms on its page there"),
        ("someone/odd", 500, "", "and the hub cannot be reached ("),
    ],
)
def test_what_the_hub_refuses_is_said_with_the_way_out(hub, name, status, code, message):
    hub(status, {"X-Error-Code": code})
    assert message in error_of(name)


def test_only_weights_configs_and_tokenizers_are_downloaded(tmp_path, monkeypatch):
    asked = []

    def snapshot_download(name, *, allow_patterns):
        asked.append((name, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    local_files("someone/asked-for")
    weights_place("someone/asked-for")
    (name, small), (other, everything) = asked
    assert name == other == "someone/asked-for"

    def taken(file, patterns):
        return any(fnmatch.fnmatchcase(file, pattern) for pattern in patterns)

    for file in ("config.json", "tokenizer.json", "tokenizer.model", "chat_template.jinja", "generation_config.json"):
        assert taken(file, small)
        assert taken(file, everything)
    for file in ("model.safetensors", "model-00001-of-00002.safetensors"):
        assert not taken(file, small)
        assert taken(file, everything)
    for file in ("pytorch_model.bin", "modeling_llama.py", "consolidated.safetensors", "README.md", "original/x.pth"):
        assert not taken(file, everything)
