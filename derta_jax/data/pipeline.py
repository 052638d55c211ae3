"""From examples and a run's config to the rows it trains on."""

import dataclasses
from collections.abc import Callable

from derta_jax.config import RunConfig
from derta_jax.data.dataset import Dataset
from derta_jax.data.row_maker import RowMaker
from derta_jax.data.template import Template
from derta_jax.data.tokenise import TokenRow, tokenise, units_of
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
    objective: RowMaker,
    tokenizer: Tokenizer,
    progress: Callable[[int], None] = lambda count: None,
) -> TrainingRows:
    """The objective's rows, tokenised. `progress` is told how many rows have been done."""
    template = Template(config.data.template, tokenizer)
    rows = objective.rows(dataset.examples, config.data, config.train.seed)
    tokenised: list[TokenRow] = []
    for count, row in enumerate(tokenise(rows, tokenizer, template, config.train.sequence_length), start=1):
        tokenised.append(row)
        progress(count)
    kept: list[TokenRow] = []
    unlabelled: list[TokenRow] = []
    for unit in units_of(tokenised):
        together = tokenised[unit.start : unit.stop]
        (kept if all(row.labelled.any() for row in together) else unlabelled).extend(together)
    return TrainingRows(kept, unlabelled, dataset.content_hash, dataset.counts)
