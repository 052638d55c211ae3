"""The rows of a run, made once: process 0 tokenises and writes a file, every process and every restart reads it."""

import contextlib
import hashlib
import importlib.metadata
import json
import time
from pathlib import Path
from typing import Any

from etils import epath
from rich.console import Console
from rich.progress import Progress

from derta_jax.config import RunConfig
from derta_jax.data.dataset import Dataset, dataset_hash, load_dataset
from derta_jax.data.pipeline import TrainingRows, training_rows
from derta_jax.data.rows_file import DamagedRows, read_rows, write_rows
from derta_jax.errors import RunFailed, UserError
from derta_jax.interop.source import local_copy
from derta_jax.interop.tensor_files import as_os_error
from derta_jax.interop.tokenizer import TOKENIZER_FILES, Tokenizer
from derta_jax.objectives.objective import of_config
from derta_jax.training.pod import processes

VERSION = 2
"""Of what happens between an example and its tokens: counts up when the same input gives other rows."""

SEEDED_RECIPES = ("recaug", "derta")
PATIENCE = 5.0
"""Seconds that a network disk may take to show one machine what another has written."""


def shared_rows(
    config: RunConfig,
    tokenizer: Tokenizer,
    files: Path,
    directory: epath.Path | None,
    console: Console,
    name: str = "train",
) -> TrainingRows:
    """The rows of `config.data`, from `<directory>/<name>-<key>.rows` where that holds them, else made and put there.

    `files` is the local directory with the tokenizer. Process 0 does all the work; the others need nothing but the
    file. The key covers all that decides the rows; files of the same name under other keys are removed. Without a
    directory each process makes its own rows and nothing is kept. All processes must call this.

    Raises `UserError` for bad data, and where `directory` cannot be written, or is another place on another process.
    """
    if directory is None:
        return _make(config, tokenizer, console)
    made: list[tuple[str, TrainingRows]] = []
    processes.first_does(
        f"{name} rows", lambda: made.append(_read_or_make(config, tokenizer, files, directory, name, console))
    )
    key = processes.gather(f"the key of the {name} rows", made[0][0] if made else None)[0]
    return made[0][1] if made else _read_of_process_0(_file(directory, name, key), key)


def rows_key(config: RunConfig, files: Path, content_hash: str) -> str:
    """A digest of all that decides the rows: the dataset, how it becomes text, the tokenizer and its libraries."""
    recipe, objective = config.data.recipe, of_config(config)
    drawn = objective.rows_are_drawn or recipe in SEEDED_RECIPES
    parts: dict[str, Any] = {
        "version": VERSION,
        "content_hash": content_hash,
        "objective": {"name": objective.name} | {key: getattr(objective, key) for key in objective.rows_depend_on},
        "recipe": recipe,
        "paper": config.data.paper,
        "template": config.data.template,
        "sequence_length": config.train.sequence_length,
        "seed": config.train.seed if drawn else None,
        # transformers looks at config.json for the tokenizer's class
        "tokenizer": {
            file: hashlib.sha256((files / file).read_bytes()).hexdigest()
            for file in (*TOKENIZER_FILES, "config.json")
            if (files / file).is_file()
        },
        "libraries": {library: importlib.metadata.version(library) for library in ("tokenizers", "transformers")},
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _file(directory: epath.Path, name: str, key: str) -> epath.Path:
    return directory / f"{name}-{key[:32]}.rows"


def _read_or_make(
    config: RunConfig, tokenizer: Tokenizer, files: Path, directory: epath.Path, name: str, console: Console
) -> tuple[str, TrainingRows]:
    path = config.data.path
    dataset = load_dataset(path) if local_copy(path).is_file() else None
    content_hash = dataset.content_hash if dataset else dataset_hash(path)
    key = rows_key(config, files, content_hash)
    file = _file(directory, name, key)
    try:
        rows = _read(file, key)
    except (FileNotFoundError, DamagedRows) as error:
        if isinstance(error, DamagedRows):
            console.print(f"rows      {file} is damaged ({error}): made again", highlight=False, soft_wrap=True)
        fresh = _make(config, tokenizer, console, dataset)
        if fresh.content_hash != content_hash:
            raise UserError(f"{path} was prepared anew while it was read: run again") from None
        _write(file, fresh, key)
        del fresh  # takes more memory than what is read
        rows = _read(file, key)
    with contextlib.suppress(OSError), as_os_error():
        for other in directory.glob(f"{name}-*"):
            if other != file:
                other.unlink(missing_ok=True)
    return key, rows


def _make(config: RunConfig, tokenizer: Tokenizer, console: Console, dataset: Dataset | None = None) -> TrainingRows:
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("read the data", total=None)
        dataset = dataset or load_dataset(config.data.path)
        bar.update(task, description="tokenise")
        return training_rows(
            dataset, config, of_config(config), tokenizer, lambda count: bar.update(task, completed=count)
        )


def _write(file: epath.Path, rows: TrainingRows, key: str) -> None:
    try:
        write_rows(file, rows, key)
    except OSError as error:
        raise UserError(f"cannot write {file} ({error}): give train.output a place with room to write") from error


def _read(file: epath.Path, key: str) -> TrainingRows:
    try:
        return read_rows(file, key)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UserError(f"cannot read {file} ({error}): give train.output a place that can be read") from error


def _read_of_process_0(file: epath.Path, key: str) -> TrainingRows:
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            return _read(file, key)
        except (FileNotFoundError, DamagedRows) as error:
            if time.monotonic() < deadline:
                time.sleep(PATIENCE / 10)
                continue
            if isinstance(error, DamagedRows):
                raise RunFailed(f"{file}, which process 0 wrote, is damaged on process {processes.index()}") from error
            raise UserError(
                f"process {processes.index()} does not find {file}, which process 0 wrote: train.output must be a "
                "place that all processes share (gs://… or a network disk)"
            ) from error
