"""Prepared datasets: validated examples as a TFDS dataset of ArrayRecords, written and read without TensorFlow.

A directory holds `derta_examples/<content hash>/1.0.0/` as TFDS lays it out, and `dataset.json`, written last, which
names the hash that counts. Editing the JSONL and preparing again therefore never reuses old data, and a preparation
that was killed leaves nothing that reads as whole; preparing again mends it. Of several that prepare into the same
directory at once, one writes and the others wait.
"""

import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import io
import json
import logging
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from derta_jax.data.examples import AuthorsRow, Example, Helpful, Triple, read_examples
from derta_jax.errors import UserError
from derta_jax.interop.source import local_copy

VERSION = "1.0.0"
KINDS: dict[str, type[Triple] | type[Helpful] | type[AuthorsRow]] = {
    "triple": Triple,
    "helpful": Helpful,
    "authors": AuthorsRow,
}
OUR_FILES = {"dataset.json", "dataset.partial", "dataset.lock", "derta_examples", "downloads"}
CHUNK = 1024
"""Records read at a time: TFDS takes half as long for each as when they are read one by one."""

COLUMNS = (
    "kind",
    "id",
    "prompt",
    "safe",
    "harmful",
    "source",
    "category",
    "response",
    "prefix",
    "text",
    "rto",
    "rejected",
)


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Examples in file order and the hash of their content, which is the dataset's identity on resume."""

    examples: list[Example]
    content_hash: str

    @property
    def counts(self) -> dict[str, int]:
        """How many examples of each kind."""
        return dict(Counter(_kind(example) for example in self.examples))


def validate(files: Sequence[str | Path]) -> Dataset:
    """Read JSONL files into memory. Raises `UserError` that lists every bad line."""
    return of_examples(read_examples(files))


def prepare(files: Sequence[str | Path], output: str | Path) -> Dataset:
    """Validate JSONL files and write them to `output` as a TFDS dataset.

    Raises `UserError` for bad input (nothing is written) and as `write` does.
    """
    return write(validate(files), output, files)


def write(dataset: Dataset, output: str | Path, files: Sequence[str | Path]) -> Dataset:
    """Write a dataset as a TFDS one, and the `files` it is from; the same content, undamaged, is left alone.

    Raises `UserError` when `output` holds something else.
    """
    output = Path(output)
    if output.exists() and (not output.is_dir() or any(file.name not in OUR_FILES for file in output.iterdir())):
        raise UserError(f"{output} exists and is not a prepared dataset: choose another --output")
    if _holds(output, dataset):
        return dataset
    output.mkdir(parents=True, exist_ok=True)
    with _locked(output / "dataset.lock"):
        # somebody else may have been at it
        if not _holds(output, dataset):
            _write(dataset, output, files)
    return dataset


def load_dataset(path: str | Path) -> Dataset:
    """Read what `prepare` wrote, or a JSONL file directly, on disk or at a URL.

    Raises `UserError` when there is nothing, or when the records are not the ones that were prepared.
    """
    place = local_copy(path)
    if place.is_file():
        return validate([place])
    import tensorflow_datasets as tfds

    with _readable(place, path), _quiet_tfds():
        summary = json.loads((place / "dataset.json").read_text())
        source = tfds.builder_from_directory(str(place / summary["directory"])).as_data_source(split="train")
        dataset = of_examples([_from_record(record) for record in _records(source)])
        intact = dataset.content_hash == summary["content_hash"]
    if not intact:
        raise _other_records(path)
    return dataset


def dataset_hash(path: str | Path) -> str:
    """The content hash of what `load_dataset` would read, without making examples of prepared records.

    Raises `UserError` as `load_dataset` does: the record files are compared with what was prepared, byte for byte.
    """
    place = local_copy(path)
    if place.is_file():
        return validate([place]).content_hash
    with _readable(place, path):
        summary = json.loads((place / "dataset.json").read_text())
        content_hash: str = summary["content_hash"]
        intact = summary["records_sha256"] == _records_digest(place / summary["directory"])
    if not intact:
        raise _other_records(path)
    return content_hash


@contextlib.contextmanager
def _readable(place: Path, path: str | Path) -> Iterator[None]:
    """What goes wrong while `place` is read, which the user calls `path`, as the `UserError` that says what to do."""
    if not (place / "dataset.json").is_file():
        raise UserError(f"no dataset in {path}: run `derta prepare FILE.jsonl --output {path}` first")
    try:
        yield
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        raise UserError(f"{path} is damaged ({error}): run `derta prepare` again") from error


def _other_records(path: str | Path) -> UserError:
    return UserError(f"{path} is damaged (its records are not those prepared): run `derta prepare` again")


def _records(source: Any) -> Iterator[dict[str, bytes]]:
    for start in range(0, len(source), CHUNK):
        yield from source.__getitems__(range(start, min(start + CHUNK, len(source))))


@contextlib.contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Alone among the processes that lock `file`. The lock ends with the process, however that ends."""
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        # some network disks know no locks: there, as without one
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(file)):
                break
        os.close(descriptor)  # who had it has removed it
    try:
        yield
    finally:
        file.unlink(missing_ok=True)
        os.close(descriptor)


def _write(dataset: Dataset, output: Path, files: Sequence[str | Path]) -> None:
    _write_tfds(dataset, output)
    directory = f"derta_examples/{dataset.content_hash}/{VERSION}"
    summary = {
        "content_hash": dataset.content_hash,
        "directory": directory,
        "records_sha256": _records_digest(output / directory),
        "counts": dataset.counts,
        "files": [str(file) for file in files],
    }
    pointer = output / "dataset.json"
    partial = pointer.with_suffix(".partial")
    partial.write_text(json.dumps(summary, indent=2) + "\n")
    os.replace(partial, pointer)


def _holds(output: Path, dataset: Dataset) -> bool:
    """Whether `output` holds this dataset, undamaged."""
    try:
        summary = json.loads((output / "dataset.json").read_text())
        same = summary["content_hash"] == dataset.content_hash
        return same and summary["records_sha256"] == _records_digest(output / summary["directory"])
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _records_digest(directory: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(directory.glob("*.array_record*")):
        with file.open("rb") as stream:
            while piece := stream.read(1 << 20):
                digest.update(piece)
    return digest.hexdigest()


def of_examples(examples: list[Example]) -> Dataset:
    """With the hash of their content."""
    digest = hashlib.sha256()
    for example in examples:
        record = _to_record(example)
        if not record["rejected"]:
            del record["rejected"]  # a hash is what it was before there was such a column
        digest.update(json.dumps(record, sort_keys=True).encode() + b"\n")
    return Dataset(examples, digest.hexdigest()[:16])


def _kind(example: Example) -> str:
    return next(kind for kind, cls in KINDS.items() if isinstance(example, cls))


def _to_record(example: Example) -> dict[str, str]:
    fields: dict[str, Any] = {"kind": _kind(example)} | dataclasses.asdict(example)
    return {column: str(fields.get(column, "")) for column in COLUMNS}


def _from_record(record: dict[str, bytes]) -> Example:
    text = {column: value.decode("utf-8") for column, value in record.items()}
    cls = KINDS[text["kind"]]
    fields: dict[str, Any] = {
        field.name: text.get("rejected", "") if field.name == "rejected" else text[field.name]
        for field in dataclasses.fields(cls)
    }
    if cls is AuthorsRow:
        fields["rto"] = fields["rto"] == "True"
    return cls(**fields)


def _write_tfds(dataset: Dataset, data_dir: Path) -> None:
    import tensorflow_datasets as tfds

    # TFDS would take what lies there for whole
    shutil.rmtree(data_dir / "derta_examples" / dataset.content_hash, ignore_errors=True)
    config = tfds.core.BuilderConfig(name=dataset.content_hash, version=VERSION)
    with _quiet_tfds():
        builder = _builder_class()(config=config, data_dir=str(data_dir), file_format="array_record")
        builder.examples = dataset.examples
        builder.download_and_prepare()


@functools.cache
def _builder_class() -> Any:
    """Made once, and not at import time: TFDS registers it by name, and takes over a second to import."""
    import tensorflow_datasets as tfds

    class DertaExamples(tfds.core.GeneratorBasedBuilder):
        name = "derta_examples"
        VERSION = tfds.core.Version(VERSION)
        examples: Sequence[Example]

        def _info(self):
            features = tfds.features.FeaturesDict({column: tfds.features.Text() for column in COLUMNS})
            return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

        def _split_generators(self, _):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for index, example in enumerate(self.examples):
                yield index, _to_record(example)

    return DertaExamples


@contextlib.contextmanager
def _quiet_tfds() -> Iterator[None]:
    """TFDS prints and logs at every step of its own; ours is one line."""
    import tensorflow_datasets as tfds

    tfds.disable_progress_bar()
    level = logging.getLogger("absl").level
    logging.getLogger("absl").setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.getLogger("absl").setLevel(level)
