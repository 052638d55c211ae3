"""Checkpoints are whole or not there: damage is found before anything is loaded, and no save costs an older one."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from derta_jax.errors import UserError
from derta_jax.training import checkpoint
from derta_jax.training.checkpoint import Checkpoints
from derta_jax.training.manifest import MANIFEST, write_manifest
from derta_jax.training.step import TrainState

IDENTITY = {"train.seed": 0, "model.layers": 2}
ROOT = Path(__file__).parents[2]


def make_state(step: int, shape=(4, 2)) -> TrainState:
    """A small state that lies on a mesh (fsdp, tensor) and in which every number depends on the step."""
    mesh = Mesh(np.array(jax.devices()).reshape(shape), ("fsdp", "tensor"))

    def place(array, *axes):
        return jax.device_put(array, NamedSharding(mesh, PartitionSpec(*axes)))

    params = {
        "layers": {"w": place(jnp.arange(128.0).reshape(2, 8, 8) + step, None, "fsdp", "tensor")},
        "norm": place(jnp.full(8, 1.0 / (step + 1))),
    }
    moments = optax.ScaleByAdamState(
        place(jnp.int32(step)), jax.tree.map(lambda x: 2 * x, params), jax.tree.map(lambda x: x * x, params)
    )
    return TrainState(place(jnp.int32(step)), {"params": params}, (moments, optax.EmptyState()))


def abstract(state: TrainState) -> TrainState:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)


ABSTRACT = abstract(make_state(0))


def assert_same(state: TrainState | None, expected: TrainState) -> None:
    assert state is not None
    jax.tree.map(np.testing.assert_array_equal, state, expected)


def save(directory: Path, *steps: int, keep: int | None = None) -> Path:
    with Checkpoints(directory, keep) as checkpoints:
        for step in steps:
            checkpoints.save(make_state(step), IDENTITY)
    return directory


def restore_newest(directory: Path, identity=IDENTITY) -> tuple[TrainState | None, list[str]]:
    with Checkpoints(directory) as checkpoints:
        return checkpoints.restore_newest(ABSTRACT, identity)


def steps_of(directory: Path) -> list[int]:
    return Checkpoints(directory).steps


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory) -> Path:
    """Checkpoints of steps 2 and 4, not to be changed."""
    return save(tmp_path_factory.mktemp("saved") / "checkpoints", 2, 4)


@pytest.fixture
def checkpoints_of_two(two_steps, tmp_path) -> Path:
    """A copy of them."""
    return Path(shutil.copytree(two_steps, tmp_path / "checkpoints"))


def test_the_newest_state_comes_back_to_the_bit_and_where_it_lay(two_steps):
    state, warnings = restore_newest(two_steps)
    expected = make_state(4)
    assert_same(state, expected)
    assert state is not None
    assert jax.tree.map(lambda leaf: leaf.sharding, state) == jax.tree.map(lambda leaf: leaf.sharding, expected)
    assert warnings == []


@pytest.mark.parametrize("shape", [(8, 1), (2, 4), (1, 8)])
def test_a_state_is_restored_onto_another_mesh(two_steps, shape):
    expected = make_state(4, shape)
    with Checkpoints(two_steps) as checkpoints:
        state, _ = checkpoints.restore_newest(abstract(expected), IDENTITY)
    assert_same(state, expected)
    assert state is not None
    assert state.trainable["params"]["layers"]["w"].sharding.mesh.devices.shape == shape


def test_where_nothing_was_saved_nothing_is_restored(tmp_path):
    assert restore_newest(tmp_path / "run" / "checkpoints") == (None, [])


def test_a_reader_makes_nothing(tmp_path):
    with Checkpoints(tmp_path / "run" / "checkpoints", keep=None) as checkpoints:
        assert checkpoints.latest_step is None
        with pytest.raises(
            UserError, match=r"step 3 .* is not whole: manifest\.json is missing; other steps there: none"
        ):
            checkpoints.restore(3, ABSTRACT, IDENTITY)
    assert list(tmp_path.iterdir()) == []


def test_what_is_saved_is_the_state_of_its_step_though_training_goes_on(tmp_path):
    next_step = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf + 1, state), donate_argnums=0)
    state = make_state(1)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(state, IDENTITY)
        for _ in range(20):
            state = next_step(state)
    assert_same(restore_newest(tmp_path / "checkpoints")[0], make_state(1))


def files_of(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def flip_a_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 16
    file.write_bytes(data)


DAMAGES: dict[str, Callable[[Path], None]] = {"truncated": truncate, "bit-flipped": flip_a_bit, "removed": Path.unlink}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_to_any_file_is_found_and_the_older_checkpoint_taken(two_steps, tmp_path, damage):
    names = files_of(two_steps / "4")
    assert len(names) > 10
    older = make_state(2)
    for number, name in enumerate(names):
        directory = tmp_path / str(number) / "checkpoints"
        shutil.copytree(two_steps, directory)
        if damage != "removed" and (directory / "4" / name).stat().st_size == 0:
            continue
        DAMAGES[damage](directory / "4" / name)
        state, warnings = restore_newest(directory)
        assert_same(state, older)
        assert len(warnings) == 1, name
        assert "step 4" in warnings[0]
        if damage == "removed" and name == MANIFEST:
            assert "interrupted" in warnings[0]
        else:
            assert f"({name} " in warnings[0]
        assert steps_of(directory) == [2]


def test_a_file_too_many_is_damage(checkpoints_of_two):
    (checkpoints_of_two / "4" / "params" / "more").touch()
    _, warnings = restore_newest(checkpoints_of_two)
    assert "params/more was not there when it was saved" in warnings[0]


def test_a_damaged_checkpoint_is_set_aside_with_its_reason_so_that_its_step_can_be_saved_again(checkpoints_of_two):
    aside = checkpoints_of_two.parent / "damaged"
    for name in ("4", "4-2"):
        truncate(checkpoints_of_two / "4" / "_CHECKPOINT_METADATA")
        _, warnings = restore_newest(checkpoints_of_two)
        assert warnings[0].startswith("the checkpoint of step 4 is damaged (_CHECKPOINT_METADATA has ")
        assert warnings[0].endswith(f"it lies in {aside} now, and training goes on from step 2")
        assert "params/_METADATA" in files_of(aside / name)
        assert "_CHECKPOINT_METADATA has" in (aside / f"{name}.txt").read_text()
        save(checkpoints_of_two, 4)
        state, warnings = restore_newest(checkpoints_of_two)
        assert_same(state, make_state(4))
        assert warnings == []


def test_when_all_are_damaged_each_is_named_and_nothing_is_touched(checkpoints_of_two):
    truncate(checkpoints_of_two / "4" / "params" / "_METADATA")
    flip_a_bit(checkpoints_of_two / "2" / MANIFEST)
    before = files_of(checkpoints_of_two.parent)
    with pytest.raises(UserError) as raised:
        restore_newest(checkpoints_of_two)
    lines = str(raised.value).splitlines()
    assert lines[0] == f"every checkpoint in {checkpoints_of_two} is damaged:"
    assert lines[1].startswith("  step 4: params/_METADATA has ")
    assert lines[2] == f"  step 2: {MANIFEST} was changed"
    assert f"remove {checkpoints_of_two} to start anew" in lines[3]
    assert files_of(checkpoints_of_two.parent) == before


def test_a_damaged_checkpoint_asked_for_by_its_step_is_refused(checkpoints_of_two):
    flip_a_bit(checkpoints_of_two / "4" / "params" / "_METADATA")
    message = r"the checkpoint of step 4 in .* is not whole: params/_METADATA was changed.*; other steps there: 2"
    with Checkpoints(checkpoints_of_two) as checkpoints:
        for read in (
            lambda: checkpoints.restore(4, ABSTRACT, IDENTITY),
            lambda: checkpoints.restore_parts(4, {"params": ABSTRACT.trainable["params"]}),
            lambda: checkpoints.open_params(4),
        ):
            with pytest.raises(UserError, match=message):
                read()
    assert steps_of(checkpoints_of_two) == [2, 4]


def test_a_checkpoint_of_another_run_is_named_before_its_files_are_read(checkpoints_of_two):
    truncate(checkpoints_of_two / "4" / "params" / "_METADATA")
    with pytest.raises(UserError, match=r"another run:\n  train\.seed: 0 in the checkpoint, 1 now"):
        restore_newest(checkpoints_of_two, IDENTITY | {"train.seed": 1})


def test_one_tensor_is_read_by_its_path_and_index(two_steps):
    with Checkpoints(two_steps) as checkpoints:
        read = checkpoints.open_params(4)
        expected = np.asarray(make_state(4).trainable["params"]["layers"]["w"])
        np.testing.assert_array_equal(read("layers/w", (1,)), expected[1])
        assert checkpoints.identity(4) == IDENTITY


@pytest.mark.parametrize("left", ["no manifest", "no commit"])
def test_an_interrupted_save_does_not_count_and_the_next_start_removes_it(checkpoints_of_two, left):
    (checkpoints_of_two / "4" / MANIFEST).unlink()
    if left == "no commit":
        (checkpoints_of_two / "4").rename(checkpoints_of_two / "4.orbax-checkpoint-tmp")
    assert steps_of(checkpoints_of_two) == [2]
    state, warnings = restore_newest(checkpoints_of_two)
    assert_same(state, make_state(2))
    assert warnings == ["saving step 4 was interrupted: it does not count"]
    assert [path.name for path in checkpoints_of_two.iterdir()] == ["2"]
    assert not (checkpoints_of_two.parent / "damaged").exists()


def test_only_an_interrupted_save_is_as_good_as_none(checkpoints_of_two):
    shutil.rmtree(checkpoints_of_two / "2")
    (checkpoints_of_two / "4" / MANIFEST).unlink()
    assert restore_newest(checkpoints_of_two) == (None, ["saving step 4 was interrupted: it does not count"])
    assert list(checkpoints_of_two.iterdir()) == []


def test_a_save_removes_what_an_interrupted_one_left(checkpoints_of_two):
    (checkpoints_of_two / "4" / MANIFEST).unlink()
    (checkpoints_of_two / "6.orbax-checkpoint-tmp").mkdir()
    save(checkpoints_of_two, 4)
    assert sorted(path.name for path in checkpoints_of_two.iterdir()) == ["2", "4"]
    assert_same(restore_newest(checkpoints_of_two)[0], make_state(4))


def test_the_newest_stay(tmp_path):
    assert steps_of(save(tmp_path / "two", 1, 2, 3, 10, keep=2)) == [3, 10]
    assert steps_of(save(tmp_path / "all", 1, 2, 3, keep=None)) == [1, 2, 3]


def test_those_of_the_lowest_held_out_loss_stay_as_well(tmp_path):
    losses = {1: 0.5, 2: 0.2, 3: None, 4: 0.3, 5: float("nan"), 6: 0.9, 7: 0.8}
    with Checkpoints(tmp_path / "checkpoints", keep=1, keep_best=2) as checkpoints:
        for step, loss in losses.items():
            checkpoints.save(make_state(step), IDENTITY, loss)
    assert steps_of(tmp_path / "checkpoints") == [2, 4, 7]
    assert json.loads((tmp_path / "checkpoints" / "4" / MANIFEST).read_text())["held_out_loss"] == 0.3


def test_older_ones_are_deleted_only_when_the_new_one_is_whole(checkpoints_of_two, monkeypatch):
    seen = []

    def look_and_write(directory, manifest):
        seen.append(steps_of(checkpoints_of_two))
        write_manifest(directory, manifest)

    monkeypatch.setattr(checkpoint, "write_manifest", look_and_write)
    save(checkpoints_of_two, 6, keep=1)
    assert seen == [[2, 4]]
    assert steps_of(checkpoints_of_two) == [6]


FAILURES = """
import errno, json, resource, sys
from tests.training.test_checkpoint import *
from derta_jax.training import checkpoint

directory = Path(sys.argv[1])
ballast = directory / "ballast"

def fill(leave: int) -> None:
    with ballast.open("ab", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError as error:
            assert error.errno == errno.ENOSPC
        file.truncate(file.seek(0, 2) - leave)

def report(name: str, failing) -> None:
    with Checkpoints(directory / "checkpoints", keep=1) as checkpoints:
        try:
            failing(checkpoints)
        except Exception as error:
            notes = getattr(error, "__notes__", [""])[0]
            print(json.dumps([name, type(error).__name__, str(error), notes, checkpoints.steps]))
    ballast.unlink(missing_ok=True)

def save_and_wait(checkpoints):
    checkpoints.save(make_state(4), IDENTITY)
    checkpoints.wait()

def no_room(checkpoints):
    fill(leave=0)
    checkpoints.save(make_state(4), IDENTITY)

def no_room_for_all(checkpoints):
    fill(leave=8 * 4096)
    checkpoints.save(make_state(4), IDENTITY)
    checkpoints.save(make_state(6), IDENTITY)

def no_room_for_the_manifest(checkpoints):
    write = checkpoint.write_manifest
    checkpoint.write_manifest = lambda *arguments: [fill(leave=0), write(*arguments)]
    try:
        save_and_wait(checkpoints)
    finally:
        checkpoint.write_manifest = write

def no_large_files(checkpoints):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, limits[1]))
    try:
        save_and_wait(checkpoints)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)

report("start", lambda checkpoints: checkpoints.save(make_state(2), IDENTITY))
for failing in (no_room, no_room_for_all, no_room_for_the_manifest, no_large_files):
    report(failing.__name__, failing)
    assert_same(restore_newest(directory / "checkpoints")[0], make_state(2))
report("end", save_and_wait)
assert steps_of(directory / "checkpoints") == [4]
"""


def test_a_save_that_fails_says_why_and_leaves_the_newest_whole_checkpoint(tmp_path):
    """A real disk of a megabyte that is full before, while and after orbax writes; and files that may not grow."""
    namespace = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    mount = f"mount -t tmpfs -o size=1m tmpfs {tmp_path}"
    if subprocess.run([*namespace, mount]).returncode:
        pytest.skip("this system does not let a test mount a file system")
    (tmp_path.parent / "failures.py").write_text(FAILURES)
    ended = subprocess.run(
        [*namespace, f"{mount} && exec {sys.executable} {tmp_path.parent / 'failures.py'} {tmp_path}"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert ended.returncode == 0, ended.stderr
    failures = {name: rest for name, *rest in map(json.loads, ended.stdout.splitlines())}
    assert failures.keys() == {"no_room", "no_room_for_all", "no_room_for_the_manifest", "no_large_files"}
    *full, other = failures.values()
    for kind, message, _, steps in full:
        assert kind == "UserError"
        assert message.startswith("the disk is full: step 4 could not be saved")
        assert steps == [2]
    kind, _, note, steps = other
    assert kind != "UserError"
    assert note.startswith("while saving step 4 to ")
    assert steps == [2]


BUCKET = """
import os, socket

with socket.socket() as listener:
    listener.bind(("localhost", 0))
    port = listener.getsockname()[1]
address = f"http://localhost:{port}"
os.environ |= {"STORAGE_EMULATOR_HOST": address, "TENSORSTORE_GCS_HTTP_URL": address, "NO_GCE_CHECK": "true"}
os.environ |= {"GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false", "FSSPEC_GCS_TOKEN": "anon"}
os.environ |= {"GCE_METADATA_ROOT": "localhost:1", "GCE_METADATA_HOST": "localhost:1"}

import gcsfs.retry
from gcp_storage_emulator.server import create_server

gcsfs.retry.is_retriable = lambda error: False  # the emulator cannot move files, and would be asked six times
server = create_server("localhost", port, in_memory=True, default_bucket="bucket")
server.start()
try:
    from etils import epath
    from tests.training.test_checkpoint import *

    run = epath.Path("gs://bucket/runs/first")
    directory = run / "checkpoints"
    assert restore_newest(directory) == (None, [])
    save(directory, 2, 4, 6, keep=2)
    assert steps_of(directory) == [4, 6]
    state, warnings = restore_newest(directory)
    assert_same(state, make_state(6))
    assert warnings == []
    with Checkpoints(directory, keep=None) as checkpoints:
        read = checkpoints.open_params(6)
        np.testing.assert_array_equal(
            read("layers/w", (1,)), np.asarray(make_state(6).trainable["params"]["layers"]["w"])[1]
        )

    metadata = directory / "6" / "params" / "_METADATA"
    metadata.write_bytes(metadata.read_bytes()[:-1])
    state, warnings = restore_newest(directory)
    assert_same(state, make_state(4))
    assert "(params/_METADATA has " in warnings[0]
    assert (run / "damaged" / "6" / "params" / "_METADATA").exists()
    assert not (directory / "6").exists()

    save(directory, 6)
    (directory / "6" / MANIFEST).unlink()
    state, warnings = restore_newest(directory)
    assert_same(state, make_state(4))
    assert warnings == ["saving step 6 was interrupted: it does not count"]
    assert [path.name for path in directory.iterdir()] == ["4"]
    print("all is well")
finally:
    server.stop()
"""


@pytest.mark.slow
def test_a_bucket_keeps_checkpoints_as_a_disk_does(tmp_path):
    """Through gcsfs and tensorstore, against an emulator of Google's storage that runs in the same process."""
    pytest.importorskip("gcsfs")
    pytest.importorskip("gcp_storage_emulator")
    (tmp_path / "bucket.py").write_text(BUCKET)
    ended = subprocess.run(
        [sys.executable, tmp_path / "bucket.py"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
    )
    assert ended.stdout.splitlines()[-1:] == ["all is well"], ended.stderr[-5000:]
