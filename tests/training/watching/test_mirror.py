from etils import epath

from derta_jax.training.watching.mirror import Mirror
from tests.training.bucket import bucket

__all__ = ["bucket"]


def test_a_local_directory_is_its_own_mirror(tmp_path):
    mirror = Mirror(tmp_path / "run")
    assert mirror.local == tmp_path / "run"
    (mirror.local / "file").write_text("text")
    mirror.push("file")
    mirror.remove()
    assert (tmp_path / "run" / "file").read_text() == "text"


def test_files_and_folders_reach_the_bucket_and_come_back(bucket):
    mirror = Mirror(bucket)
    (mirror.local / "folder" / "deep").mkdir(parents=True)
    (mirror.local / "folder" / "deep" / "one").write_text("1")
    (mirror.local / "two").write_text("2")
    (mirror.local / "unnamed").write_text("stays")
    mirror.push("folder", "two", "absent")
    mirror.remove()
    assert not mirror.local.exists()
    run = epath.Path(bucket)
    assert (run / "folder" / "deep" / "one").read_text() == "1"
    assert not (run / "unnamed").exists()

    again = Mirror(bucket)
    again.pull("two", "absent")
    assert [file.name for file in again.local.iterdir()] == ["two"]
    assert (again.local / "two").read_text() == "2"
    again.remove()


def test_a_file_in_the_bucket_is_replaced_by_a_longer_one(bucket):
    mirror = Mirror(bucket)
    for text in ("one", "one two"):
        (mirror.local / "file").write_text(text)
        mirror.push("file")
        assert (epath.Path(bucket) / "file").read_text() == text
    mirror.remove()
