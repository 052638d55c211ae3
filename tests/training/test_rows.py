"""The rows of a run are made once, and read by every process and every restart."""

import hashlib
import io
import itertools
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import fsspec
import numpy as np
import pytest
from etils import epath
from rich.console import Console

from derta_jax.config import RunConfig, dump_config
from derta_jax.data.dataset import load_dataset, prepare
from derta_jax.data.pipeline import TrainingRows, training_rows
from derta_jax.errors import UserError
from derta_jax.interop.tokenizer import load_tokenizer
from derta_jax.objectives.objective import of_config
from derta_jax.training import rows as rows_module
from derta_jax.training.rows import VERSION, rows_key, shared_rows
from tests.conftest import helpful, triple, write_jsonl, write_tokenizer
from tests.training.bucket import bucket
from tests.training.pod.start import free_port

__all__ = ["bucket"]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """A directory with a tokenizer."""
    directory = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(directory)
    (directory / "config.json").write_text('{"model_type": "llama"}')
    return directory


@pytest.fixture
def directory(tmp_path) -> epath.Path:
    return epath.Path(tmp_path / "run" / "rows")


@pytest.fixture
def config(rows_file, tmp_path) -> RunConfig:
    return changed(
        RunConfig.model_validate(
            {"model": {"path": "unused"}, "data": {"path": str(rows_file)}, "train": {"output": "run", "steps": 2}}
        )
    )


def changed(config: RunConfig, **sections) -> RunConfig:
    raw = config.model_dump()
    for section, values in sections.items():
        raw[section] |= values
    return RunConfig.model_validate(raw)


def shared(config: RunConfig, files: Path, directory: epath.Path | None, **options) -> TrainingRows:
    return shared_rows(config, load_tokenizer(files), files, directory, Console(quiet=True), **options)


def as_values(data: TrainingRows) -> list:
    rows = [
        {name: np.asarray(value).tolist() for name, value in vars(row).items()}
        for row in (*data.rows, *data.unlabelled)
    ]
    return [rows, len(data.rows), data.content_hash, data.counts]


def names_in(directory: epath.Path) -> list[str]:
    return sorted(file.name for file in directory.iterdir())


@pytest.fixture
def no_work(monkeypatch):
    """From here on, reading examples is an error; without a tokenizer nothing can be tokenised either."""

    def forbid() -> None:
        def refuse(path):
            raise AssertionError(f"read the examples of {path}")

        monkeypatch.setattr(rows_module, "load_dataset", refuse)

    return forbid


@pytest.mark.parametrize("sequence_length", [1024, 24])
def test_they_are_the_rows_that_the_pipeline_makes(config, files, directory, sequence_length):
    config = changed(config, train={"sequence_length": sequence_length})
    expected = training_rows(load_dataset(config.data.path), config, of_config(config), load_tokenizer(files))
    assert as_values(shared(config, files, directory)) == as_values(expected)
    assert as_values(shared(config, files, directory)) == as_values(expected)


def test_a_restart_reads_neither_the_examples_nor_the_tokenizer(config, files, directory, no_work, tmp_path):
    prepare([config.data.path], tmp_path / "dataset")
    config = changed(config, data={"path": str(tmp_path / "dataset")})
    first = shared(config, files, directory)
    no_work()
    again = shared_rows(config, None, files, directory, Console(quiet=True))  # type: ignore[arg-type]
    assert as_values(again) == as_values(first)


@pytest.mark.parametrize("prepared", [True, False])
def test_a_dataset_in_a_bucket_has_the_rows_of_the_one_on_disk(config, files, directory, tmp_path, prepared):
    path = tmp_path / "dataset" if prepared else Path(config.data.path)
    if prepared:
        prepare([config.data.path], path)
    url = f"memory://{tmp_path.name}/{path.name}"
    fsspec.filesystem("memory").put(str(path), url, recursive=prepared)
    remote = changed(config, data={"path": url})
    assert as_values(shared(remote, files, directory)) == as_values(shared(config, files, directory))


def test_a_prepared_dataset_and_its_jsonl_have_the_same_rows(config, files, directory, tmp_path):
    prepare([config.data.path], tmp_path / "dataset")
    shared(config, files, directory)
    names = names_in(directory)
    shared(changed(config, data={"path": str(tmp_path / "dataset")}), files, directory)
    assert names_in(directory) == names


def test_without_a_directory_nothing_is_kept(config, files, directory, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    assert as_values(shared(config, files, None)) == as_values(shared(config, files, directory))
    assert set(tmp_path.rglob("*")) - set(before) == {
        Path(directory.parent),
        Path(directory),
        *(Path(file) for file in directory.iterdir()),
    }


def test_rows_are_kept_in_a_bucket_as_on_a_disk(config, files, bucket):
    directory = epath.Path(bucket) / "rows"
    assert as_values(shared(config, files, directory)) == as_values(shared(config, files, directory))
    assert len(names_in(directory)) == 1


KEYS: dict[str, list[dict[str, object]]] = {
    "data": [{"recipe": "vanilla"}, {"paper": True}, {"template": "Q: {prompt}\nA:"}],
    "train": [{"sequence_length": 96}, {"seed": 1}],
}


def test_the_key_covers_all_that_decides_the_rows(config, files):
    variants = [changed(config, **{section: values}) for section in KEYS for values in KEYS[section]]
    keys = [rows_key(variant, files, "hash") for variant in (config, *variants)]
    assert len({*keys, rows_key(config, files, "another")}) == len(keys) + 1


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json", "config.json"])
def test_the_key_covers_the_tokenizer(config, tmp_path, file):
    write_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    before = rows_key(config, tmp_path, "hash")
    (tmp_path / file).write_text((tmp_path / file).read_text() + " ")
    assert rows_key(config, tmp_path, "hash") != before


@pytest.mark.parametrize(
    "other",
    [
        {"train": {"learning_rate": 1e-3, "batch_size": 4, "output": "elsewhere"}},
        {"data": {"path": "elsewhere", "packing": "none"}},
        {"objective": {"sorry_keep_rate": 0.5}},
    ],
)
def test_the_key_covers_nothing_else(config, files, other):
    assert rows_key(changed(config, **other), files, "hash") == rows_key(config, files, "hash")


def test_the_version_counts_up_when_the_same_input_gives_other_rows(config, files):
    """Where this fails, and should: raise VERSION, and write the new digest here beside it."""
    digest = hashlib.sha256()
    for recipe, paper in itertools.product(["vanilla", "recaug", "rto", "derta"], [False, True]):
        variant = changed(config, data={"recipe": recipe, "paper": paper}, train={"sequence_length": 200})
        rows = training_rows(load_dataset(config.data.path), variant, of_config(variant), load_tokenizer(files))
        digest.update(json.dumps(as_values(rows)[0]).encode())
    assert (VERSION, digest.hexdigest()[:16]) == (2, "5309fa6b9d40612e")


@pytest.mark.parametrize(("recipe", "matters"), [("vanilla", False), ("rto", False), ("recaug", True), ("derta", True)])
def test_the_seed_counts_where_a_recipe_draws(config, files, recipe, matters):
    keys = {
        rows_key(changed(config, data={"recipe": recipe}, train={"seed": seed}), files, "hash") for seed in range(3)
    }
    assert len(keys) == (3 if matters else 1)


def test_rows_of_old_keys_and_what_a_killed_process_left_are_removed(config, files, directory):
    shared(config, files, directory)
    (directory / "train-0123.rows.77.partial").write_text("half of it")
    shared(changed(config, train={"seed": 1}), files, directory)
    [name] = names_in(directory)
    assert name.startswith("train-")


def test_held_out_rows_live_beside_those_that_are_trained_on(config, files, directory, tmp_path, no_work):
    held_out = write_jsonl(tmp_path / "held_out.jsonl", [triple(100), helpful(100)])
    prepare([held_out], tmp_path / "held_out")
    prepare([config.data.path], tmp_path / "dataset")
    config = changed(config, data={"path": str(tmp_path / "dataset")})
    other = changed(config, data={"path": str(tmp_path / "held_out")})
    first = [shared(config, files, directory), shared(other, files, directory, name="held_out")]
    assert [len(data.rows) for data in first] == [22, 3]
    no_work()
    again = [shared(config, files, directory), shared(other, files, directory, name="held_out")]
    assert list(map(as_values, again)) == list(map(as_values, first))


@pytest.mark.parametrize("damage", [lambda content: content[:-1], lambda content: b"", lambda content: content[::-1]])
def test_a_damaged_file_is_made_again_and_the_damage_is_said(config, files, directory, damage):
    first = shared(config, files, directory)
    [file] = directory.iterdir()
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    text = io.StringIO()
    again = shared_rows(config, load_tokenizer(files), files, directory, Console(file=text, width=1000))
    assert as_values(again) == as_values(first)
    assert file.read_bytes() == whole
    assert text.getvalue().startswith(f"rows      {file} is damaged (it is cut off")


def test_rows_of_another_key_under_this_name_are_made_again(config, files, directory):
    first = shared(config, files, directory)
    [file] = directory.iterdir()
    whole = file.read_bytes()
    shared(changed(config, train={"seed": 1}), files, directory)
    [other] = directory.iterdir()
    other.rename(file)
    assert as_values(shared(config, files, directory)) == as_values(first)
    assert file.read_bytes() == whole


def test_bad_data_is_the_users_error_and_leaves_nothing(config, files, directory):
    write_jsonl(Path(config.data.path), [triple(0, safe="")])
    with pytest.raises(UserError, match=r"rows\.jsonl:1: safe: is empty"):
        shared(config, files, directory)
    assert not directory.exists()


def test_data_that_turned_bad_is_found_at_a_restart(config, files, directory, tmp_path):
    prepare([config.data.path], tmp_path / "dataset")
    config = changed(config, data={"path": str(tmp_path / "dataset")})
    shared(config, files, directory)
    [records] = (tmp_path / "dataset").rglob("*.array_record*")
    records.write_bytes(records.read_bytes()[:-1])
    with pytest.raises(UserError, match="dataset is damaged"):
        shared(config, files, directory)


def test_a_place_that_cannot_be_written_names_the_key(config, files, tmp_path):
    (tmp_path / "run").write_text("a file")
    with pytest.raises(UserError, match=r"cannot read .*\.rows \(.*Not a directory.* give train\.output a place"):
        shared(config, files, epath.Path(tmp_path / "run" / "rows"))


def test_a_full_disk_names_the_key_and_leaves_no_half_file(config, files, directory):
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))
    try:
        with pytest.raises(UserError, match=r"cannot write .*\.rows \(.*: give train\.output a place with room"):
            shared(config, files, directory)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert names_in(directory) == []
    assert len(shared(config, files, directory).rows) == 22


PROCESS = """
import hashlib, sys
from pathlib import Path
from etils import epath
from rich.console import Console
from derta_jax.config import Processes, load_config
from derta_jax.errors import RunFailed, UserError
from derta_jax.interop.tokenizer import load_tokenizer
from derta_jax.training.pod import processes
from derta_jax.training.pod.cluster import joined, leave
from derta_jax.training.rows import shared_rows

config, files, directory = sys.argv[1:]
try:
    with joined(Processes(start_timeout=60, heartbeat_timeout=10, barrier_timeout=60)):
        tokenizer = load_tokenizer(files) if processes.index() == 0 else None
        data = shared_rows(load_config(config), tokenizer, Path(files), epath.Path(directory), Console(quiet=True))
        content = b"".join(row.id.encode() + row.token_ids.tobytes() + row.regions.tobytes() for row in data.rows)
        print(len(data.rows), data.content_hash, data.counts, hashlib.sha256(content).hexdigest())
except (UserError, RunFailed) as error:
    print(error, file=sys.stderr)
    leave(2)
"""


def run_processes(configs: list[RunConfig], files: Path, directories: list[Path], tmp_path) -> list[tuple[int, str]]:
    """One process for each config; their exit codes and what they printed."""
    port = free_port()
    started = []
    for index, (config, directory) in enumerate(zip(configs, directories, strict=True)):
        file = tmp_path / f"{index}.yaml"
        file.write_text(dump_config(config))
        environment = os.environ | {
            "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
            "JAX_NUM_PROCESSES": str(len(configs)),
            "JAX_PROCESS_ID": str(index),
        }
        command = [sys.executable, "-c", PROCESS, str(file), str(files), str(directory)]
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        started.append(subprocess.Popen(command, env=environment, cwd=Path(__file__).parents[2], **streams))  # type: ignore[call-overload]
    try:
        printed = [process.communicate(timeout=120)[0] for process in started]
        return [(process.returncode, text) for process, text in zip(started, printed, strict=True)]
    finally:
        for process in started:
            process.kill()


@pytest.mark.slow
def test_process_0_alone_needs_the_data_and_the_tokenizer_and_all_get_the_same_rows(config, files, directory, tmp_path):
    elsewhere = changed(config, data={"path": "not there"})
    ends = run_processes([config, elsewhere], files, [Path(directory)] * 2, tmp_path)
    assert [code for code, _ in ends] == [0, 0], ends
    assert ends[0][1] == ends[1][1]
    assert ends[0][1].startswith("22 ")


@pytest.mark.slow
def test_processes_that_share_no_place_are_told_so(config, files, tmp_path):
    ends = run_processes([config] * 2, files, [tmp_path / "0" / "rows", tmp_path / "1" / "rows"], tmp_path)
    assert [code for code, _ in ends] == [2, 2], ends
    for _, text in ends:
        assert f"process 1 does not find {tmp_path / '1' / 'rows'}" in text
        assert "train.output must be a place that all processes share" in text


@pytest.mark.slow
def test_bad_data_ends_all_processes_with_the_same_message(config, files, directory, tmp_path):
    write_jsonl(Path(config.data.path), [triple(0, safe="")])
    ends = run_processes([config] * 2, files, [Path(directory)] * 2, tmp_path)
    assert [code for code, _ in ends] == [2, 2], ends
    assert all("rows.jsonl:1: safe: is empty" in text for _, text in ends)
