"""A prepared dataset gives back what was put in, or says that it does not."""

import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest

from derta_jax.data.dataset import dataset_hash, load_dataset, prepare, validate
from derta_jax.errors import UserError
from tests.conftest import helpful, triple, write_jsonl

AUTHORS = {"prefix": "[INST] How? [\\INST] First,", "text": " Sorry, no.<|end_of_text|>", "safe": "false"}


@pytest.fixture
def prepared(rows_file, tmp_path) -> Path:
    prepare([rows_file], tmp_path / "dataset")
    return tmp_path / "dataset"


def files_of(directory: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in directory.rglob("*") if file.is_file()}


def records_of(directory: Path) -> Path:
    """The ArrayRecord file that counts."""
    summary = json.loads((directory / "dataset.json").read_text())
    [file] = (directory / summary["directory"]).glob("*.array_record*")
    return file


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def empty(file: Path) -> None:
    file.write_bytes(b"")


DAMAGES = [truncate, flip_a_bit, empty, Path.unlink]


def test_a_prepared_dataset_gives_the_same_examples_in_the_same_order(tmp_path):
    rows = [helpful(3), triple(2), AUTHORS, triple(1), helpful(1)]
    file = write_jsonl(tmp_path / "rows.jsonl", rows)
    prepare([file], tmp_path / "dataset")
    assert load_dataset(tmp_path / "dataset") == validate([file])


def test_text_comes_back_character_for_character(tmp_path):
    text = ' \tCafé naïve 東京 😀 "quoted" \\INST\r\n\u2028\x00 '
    file = write_jsonl(tmp_path / "rows.jsonl", [triple(1, harmful=text, category="")])
    prepare([file], tmp_path / "dataset")
    [example] = load_dataset(tmp_path / "dataset").examples
    assert example == validate([file]).examples[0]
    assert example.harmful == text  # type: ignore[union-attr]


def test_several_files_become_one_dataset(tmp_path):
    files = [write_jsonl(tmp_path / f"{i}.jsonl", [helpful(i)]) for i in range(3)]
    prepare(files, tmp_path / "dataset")
    assert [example.id for example in load_dataset(tmp_path / "dataset").examples] == [
        "helpful-0",
        "helpful-1",
        "helpful-2",
    ]


def test_examples_are_counted_by_kind(rows_file):
    assert validate([rows_file]).counts == {"triple": 6, "helpful": 10}


def test_a_jsonl_file_is_a_dataset_too(rows_file):
    assert load_dataset(rows_file) == validate([rows_file])


def test_editing_the_jsonl_and_preparing_again_never_reuses_old_data(prepared, rows_file):
    old = load_dataset(prepared)
    write_jsonl(rows_file, [triple(0, safe="Sorry, I will not.")])
    prepare([rows_file], prepared)
    new = load_dataset(prepared)
    assert new == validate([rows_file])
    assert new.content_hash != old.content_hash


def test_going_back_to_an_earlier_text_gives_the_earlier_data(prepared, rows_file):
    before, text = load_dataset(prepared), rows_file.read_text()
    write_jsonl(rows_file, [triple(0)])
    prepare([rows_file], prepared)
    rows_file.write_text(text)
    prepare([rows_file], prepared)
    assert load_dataset(prepared) == before


def test_the_hash_depends_on_order_and_on_every_field(tmp_path):
    def content_hash(*rows):
        return validate([write_jsonl(tmp_path / "rows.jsonl", rows)]).content_hash

    hashes = [
        content_hash(triple(0), triple(1)),
        content_hash(triple(1), triple(0)),
        *(content_hash(triple(0, **{field: "other"}), triple(1)) for field in triple(0)),
    ]
    assert len(set(hashes)) == len(hashes)


def test_the_hash_does_not_depend_on_how_the_json_is_written(tmp_path, rows_file):
    rows = [json.loads(line) for line in rows_file.read_text().splitlines()]
    spaced = tmp_path / "spaced.jsonl"
    spaced.write_text("\n\n".join(json.dumps(row, ensure_ascii=False, separators=(" , ", " : ")) for row in rows))
    assert validate([spaced]).content_hash == validate([rows_file]).content_hash


def test_preparing_the_same_again_touches_nothing(prepared, rows_file):
    def state():
        return {file: file.stat().st_mtime_ns for file in files_of(prepared)}

    before = state()
    prepare([rows_file], prepared)
    assert state() == before


def test_bad_input_leaves_nothing_behind(tmp_path):
    bad = write_jsonl(tmp_path / "bad.jsonl", [triple(0), triple(1, safe="")])
    with pytest.raises(UserError):
        prepare([bad], tmp_path / "dataset")
    assert not (tmp_path / "dataset").exists()


def test_bad_input_leaves_an_earlier_dataset_as_it_was(prepared, rows_file):
    before = files_of(prepared)
    write_jsonl(rows_file, [triple(0, safe="")])
    with pytest.raises(UserError):
        prepare([rows_file], prepared)
    assert files_of(prepared) == before


def test_a_directory_that_holds_something_else_is_refused_untouched(rows_file, tmp_path):
    foreign = tmp_path / "thesis"
    foreign.mkdir()
    (foreign / "chapter.txt").write_text("words")
    with pytest.raises(UserError, match=f"{foreign} exists and is not a prepared dataset"):
        prepare([rows_file], foreign)
    assert files_of(foreign) == {foreign / "chapter.txt": b"words"}


def test_a_file_as_output_is_refused(rows_file):
    with pytest.raises(UserError, match="exists and is not a prepared dataset"):
        prepare([rows_file], rows_file)


def test_an_empty_directory_is_a_good_output(rows_file, tmp_path):
    (tmp_path / "dataset").mkdir()
    prepare([rows_file], tmp_path / "dataset")
    assert load_dataset(tmp_path / "dataset") == validate([rows_file])


def test_a_directory_without_a_dataset_says_how_to_make_one(tmp_path):
    with pytest.raises(UserError, match=f"run `derta prepare FILE.jsonl --output {tmp_path}` first"):
        load_dataset(tmp_path)


@pytest.fixture
def bucket(tmp_path):
    """A URL of this test's own, and a function that puts a file or directory there."""
    url = f"memory://{tmp_path.name}"

    def put(path):
        fsspec.filesystem("memory").put(str(path), f"{url}/{path.name}", recursive=path.is_dir())
        return f"{url}/{path.name}"

    return put


def test_a_dataset_in_a_bucket_is_the_one_that_was_put_there(prepared, rows_file, bucket):
    for place in (prepared, rows_file):
        url = bucket(place)
        assert load_dataset(url) == load_dataset(f"{url}/") == validate([rows_file])
        assert dataset_hash(url) == validate([rows_file]).content_hash


def test_errors_about_a_dataset_in_a_bucket_name_its_url(prepared, tmp_path, bucket):
    with pytest.raises(UserError, match=f"cannot read memory://{tmp_path.name}/nothing"):
        load_dataset(f"memory://{tmp_path.name}/nothing")
    records_of(prepared).write_bytes(b"")
    url = bucket(prepared)
    for read in (load_dataset, dataset_hash):
        with pytest.raises(UserError, match=f"{url} is damaged"):
            read(url)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_record_file_is_found_on_load(prepared, damage):
    damage(records_of(prepared))
    with pytest.raises(UserError, match=f"{prepared} is damaged"):
        load_dataset(prepared)


@pytest.mark.parametrize("damage", DAMAGES)
def test_preparing_again_mends_a_damaged_record_file(prepared, rows_file, damage):
    damage(records_of(prepared))
    prepare([rows_file], prepared)
    assert load_dataset(prepared) == validate([rows_file])


def test_records_of_another_dataset_are_found_on_load(prepared, tmp_path):
    prepare([write_jsonl(tmp_path / "other.jsonl", [helpful(i) for i in range(16)])], tmp_path / "other")
    records_of(prepared).write_bytes(records_of(tmp_path / "other").read_bytes())
    with pytest.raises(UserError, match=f"{prepared} is damaged"):
        load_dataset(prepared)


def test_a_broken_dataset_json_is_found_on_load_and_mended_by_preparing_again(prepared, rows_file):
    (prepared / "dataset.json").write_text('{"content_ha')
    with pytest.raises(UserError, match=f"{prepared} is damaged"):
        load_dataset(prepared)
    prepare([rows_file], prepared)
    assert load_dataset(prepared) == validate([rows_file])


def test_a_preparation_that_was_killed_before_its_end_is_no_dataset_and_can_be_done_again(prepared, rows_file):
    (prepared / "dataset.json").unlink()
    truncate(next(prepared.rglob("*.array_record*")))
    with pytest.raises(UserError, match="no dataset in"):
        load_dataset(prepared)
    prepare([rows_file], prepared)
    assert load_dataset(prepared) == validate([rows_file])


def test_the_hash_is_known_without_reading_the_examples(prepared, rows_file):
    assert dataset_hash(prepared) == dataset_hash(rows_file) == validate([rows_file]).content_hash


def test_the_hash_of_what_is_no_dataset_says_how_to_make_one(tmp_path):
    with pytest.raises(UserError, match=f"run `derta prepare FILE.jsonl --output {tmp_path}` first"):
        dataset_hash(tmp_path)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_record_file_has_no_hash(prepared, damage):
    damage(records_of(prepared))
    with pytest.raises(UserError, match=rf"{prepared} is damaged .*run `derta prepare` again"):
        dataset_hash(prepared)


@pytest.mark.parametrize("text", ['{"content_ha', "{}", "[]"])
def test_a_broken_dataset_json_has_no_hash(prepared, text):
    (prepared / "dataset.json").write_text(text)
    with pytest.raises(UserError, match=f"{prepared} is damaged"):
        dataset_hash(prepared)


def start_prepare(rows: Path, output: Path) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-m", "derta_jax.cli", "prepare", str(rows), "--output", str(output)])


def wait_for(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.001)


def has_open(process: subprocess.Popen, file: Path) -> bool:
    links = Path(f"/proc/{process.pid}/fd").iterdir()
    with contextlib.suppress(FileNotFoundError):  # one was closed while we looked
        return any(link.resolve() == file for link in links)
    return False


@pytest.fixture
def many_rows(tmp_path) -> Path:
    """Enough to be caught while writing them."""
    return write_jsonl(tmp_path / "many.jsonl", [helpful(i) for i in range(4000)])


@pytest.mark.slow
@pytest.mark.parametrize("first_ends_by", [signal.SIGCONT, signal.SIGKILL])
def test_of_two_that_prepare_at_once_the_second_waits_until_the_first_is_done_or_dead(
    many_rows, tmp_path, first_ends_by
):
    output = tmp_path / "dataset"
    first = start_prepare(many_rows, output)
    try:
        wait_for(lambda: list(output.rglob("*.array_record*")))
        first.send_signal(signal.SIGSTOP)
        before = files_of(output)
        assert output / "dataset.json" not in before
        second = start_prepare(many_rows, output)
        wait_for(lambda: has_open(second, output / "dataset.lock"))
        with pytest.raises(subprocess.TimeoutExpired):
            second.wait(0.5)
        assert files_of(output) == before
    finally:
        first.send_signal(first_ends_by)
    assert second.wait(60) == 0
    assert first.wait(60) == (0 if first_ends_by == signal.SIGCONT else -signal.SIGKILL)
    assert load_dataset(output) == validate([many_rows])
    assert not (output / "dataset.lock").exists()


@pytest.mark.slow
def test_several_that_prepare_at_once_all_succeed(many_rows, tmp_path):
    several = [start_prepare(many_rows, tmp_path / "dataset") for _ in range(3)]
    assert [process.wait(120) for process in several] == [0, 0, 0]
    assert load_dataset(tmp_path / "dataset") == validate([many_rows])


@pytest.mark.slow
@pytest.mark.parametrize("sign_of_progress", ["dataset.lock", "derta_examples/*/*", "**/*.array_record*"])
def test_preparing_again_mends_what_a_killed_one_left(many_rows, tmp_path, sign_of_progress):
    output = tmp_path / "dataset"
    killed = start_prepare(many_rows, output)
    wait_for(lambda: list(output.glob(sign_of_progress)))
    killed.kill()
    assert killed.wait() == -signal.SIGKILL
    with pytest.raises(UserError, match="no dataset in"):
        load_dataset(output)
    prepare([many_rows], output)
    assert load_dataset(output) == validate([many_rows])
    assert not (output / "dataset.lock").exists()


def test_a_rejected_answer_is_kept_and_data_without_one_has_the_hash_it_had(tmp_path):
    plain, paired = helpful(1), helpful(2, rejected="I do not know.")
    with_pair = prepare([write_jsonl(tmp_path / "pairs.jsonl", [plain, paired])], tmp_path / "pairs")
    assert load_dataset(tmp_path / "pairs").examples == with_pair.examples
    assert [getattr(example, "rejected", None) for example in with_pair.examples] == ["", "I do not know."]
    assert validate([write_jsonl(tmp_path / "plain.jsonl", [plain])]).content_hash == "29c17fba805e0e5a"
