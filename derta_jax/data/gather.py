"""A dataset from files of several kinds, without the prompts that a model will be evaluated with."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from derta_jax.data.dataset import Dataset, of_examples
from derta_jax.data.examples import read_examples
from derta_jax.data.public_sets import Conversion, read_public_set
from derta_jax.data.refused_prompts import allowed, read_refused, refuse_any
from derta_jax.errors import UserError

Files = Sequence[str | Path]


def gather(
    files: Files,
    more: Files = (),
    *,
    source: str | None = None,
    limit: int | None = None,
    refuse: Files = (),
    leave_out: Files = (),
) -> tuple[Dataset, dict[str, int]]:
    """The dataset, and what was left out, by reason.

    `files` are of the public set `source`, of which `limit` triples are taken, or in our formats; `more` are in ours.
    Raises `UserError` for bad files, an id that is there twice, and where a prompt is on one of the lists `refuse`.
    """
    if source is None:
        found = Conversion(read_examples([*files, *more]), {})
    else:
        found = read_public_set(source, files, limit)
        found.examples.extend(read_examples(more) if more else [])
    twice = [name for name, times in Counter(example.id for example in found.examples).items() if times > 1]
    if twice:
        raise UserError(f"ids are used more than once: {', '.join(twice[:10])}")
    refuse_any(found.examples, read_refused(refuse))
    kept = allowed(found.examples, read_refused(leave_out))
    if len(kept) < len(found.examples):
        found.left_out["prompts of --leave-out"] = len(found.examples) - len(kept)
    return of_examples(kept), found.left_out
