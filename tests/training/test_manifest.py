"""The manifest of a checkpoint: what it holds, and that nothing about a checkpoint changes unseen."""

import json

import pytest
from etils import epath

from derta_jax.training.manifest import (
    MANIFEST,
    Damaged,
    Manifest,
    check_files,
    digest_files,
    read_manifest,
    write_manifest,
)

HELLO = "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"


@pytest.fixture
def directory(tmp_path):
    """A whole directory of two files."""
    directory = epath.Path(tmp_path / "7")
    (directory / "params" / "d").mkdir(parents=True)
    (directory / "params" / "d" / "weights").write_text("hello")
    (directory / "empty").write_text("")
    write_manifest(directory, Manifest(7, 0.25, {"train.seed": 0}, digest_files(directory)))
    return directory


def damage_of(directory) -> str:
    with pytest.raises(Damaged) as raised:
        check_files(directory, read_manifest(directory))
    return str(raised.value)


def test_a_manifest_names_every_other_file_with_its_size_and_digest(directory):
    content = json.loads((directory / MANIFEST).read_text())
    assert content["step"] == 7
    assert content["held_out_loss"] == 0.25
    assert content["files"].keys() == {"empty", "params/d/weights"}
    assert content["files"]["params/d/weights"] == {"bytes": 5, "sha256": HELLO}


def test_what_is_written_is_read_and_nothing_partial_is_left(directory):
    manifest = read_manifest(directory)
    assert manifest == Manifest(7, 0.25, {"train.seed": 0}, digest_files(directory))
    check_files(directory, manifest)
    assert sorted(path.name for path in directory.iterdir()) == ["empty", MANIFEST, "params"]


@pytest.mark.parametrize("bit", [0, 5, 7])
def test_a_flipped_bit_in_any_byte_of_a_manifest_is_damage(directory, bit):
    whole = (directory / MANIFEST).read_bytes()
    for place in range(len(whole)):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << bit
        (directory / MANIFEST).write_bytes(flipped)
        with pytest.raises(Damaged, match=f"{MANIFEST} was changed"):
            read_manifest(directory)


def test_a_manifest_cut_at_any_length_is_damage(directory):
    whole = (directory / MANIFEST).read_bytes()
    for length in range(len(whole)):
        (directory / MANIFEST).write_bytes(whole[:length])
        with pytest.raises(Damaged, match=f"{MANIFEST} was changed"):
            read_manifest(directory)


def test_a_manifest_that_is_gone_is_said_to_be_missing(directory):
    (directory / MANIFEST).unlink()
    with pytest.raises(Damaged, match=f"{MANIFEST} is missing"):
        read_manifest(directory)


def test_damage_says_which_file_and_what_is_wrong_with_it(directory):
    weights = directory / "params" / "d" / "weights"
    weights.write_text("hell")
    assert damage_of(directory) == "params/d/weights has 4 bytes instead of 5"
    weights.write_text("jello")
    assert damage_of(directory) == f"params/d/weights was changed: its SHA-256 is not that in {MANIFEST}"
    weights.unlink()
    assert damage_of(directory) == "params/d/weights is missing"
    (directory / "more").write_text("")
    assert damage_of(directory) == "more was not there when it was saved; params/d/weights is missing"
