"""From examples and a run's config to the rows it trains on."""

import dataclasses
from collections.abc import Callable

from derta_jax.config import RunConfig
from derta_jax.data.dataset import Dataset
from derta_jax.data.recipes import rows_from_examples
from derta_jax.data.template import Template
from derta_jax.data.tokenise import TokenRow, tokenise
from derta_jax.interop.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class TrainingRows:
    """`unlabelled` rows lost every label to truncation: reported, not trained on.

    `content_hash` is the dataset's, `counts` how many examples of each kind it has.
    """

    rows: list[TokenRow]
    unlabelled: list[TokenRow]
    content_hash: str
    counts: dict[str, int]


def training_rows(
    dataset: Dataset,
    config: RunConfig,
    tokenizer: Tokenizer,
    progress: Callable[[int], None] = lambda count: None,
) -> TrainingRows:
    """Apply the recipe, tokenise. `progress` is told how many rows have been done."""
    template = Template(config.data.template, tokenizer)
    rows = rows_from_examples(dataset.examples, config.data.recipe, config.train.seed, config.data.paper)
    kept: list[TokenRow] = []
    unlabelled: list[TokenRow] = []
    for count, row in enumerate(tokenise(rows, tokenizer, template, config.train.sequence_length), start=1):
        (kept if row.labelled.any() else unlabelled).append(row)
        progress(count)
    return TrainingRows(kept, unlabelled, dataset.content_hash, dataset.counts)
