"""Files that are there as a whole or not at all."""

import json

import pytest

from derta_jax.errors import UserError
from derta_jax.evaluation.files import make_directory, write_rows, write_whole


def test_a_file_is_the_old_one_or_the_new_one(tmp_path):
    path = tmp_path / "made" / "rows.jsonl"
    write_rows([{"a": 1}, {"b": "naïve"}], path)
    with pytest.raises(TypeError):
        write_rows([{"a": object()}], path)
    assert [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] == [{"a": 1}, {"b": "naïve"}]
    write_whole("new", path)
    assert path.read_text() == "new"
    assert list(path.parent.iterdir()) == [path]


def test_half_a_character_does_not_stop_a_file(tmp_path):
    write_whole("so \ud83d far", tmp_path / "a.txt")
    assert (tmp_path / "a.txt").read_text() == "so ? far"


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "directory").mkdir()
    for path in (tmp_path / "file" / "a.json", tmp_path / "directory"):
        with pytest.raises(UserError, match=f"cannot write {path}: "):
            write_whole("", path)
    with pytest.raises(UserError, match="cannot write to"):
        make_directory(tmp_path / "file" / "a")
    assert sorted(tmp_path.iterdir()) == [tmp_path / "directory", tmp_path / "file"]
