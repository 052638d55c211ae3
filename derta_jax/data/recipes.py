"""How examples become rows to train on: the paper's method and its ablations, each a pure function of one triple.

Every recipe gives two rows a triple, so that batches, steps and the share of safety data are the same for all:

    vanilla   the safe answer, twice
    recaug    the safe answer after a random-length prefix of the harmful one, two draws
    rto       the safe answer; the harmful answer with the refusal token as every label
    derta     the safe answer after a random-length harmful prefix; the harmful answer with refusal labels

Source: "Refuse Whenever You Feel Unsafe", arXiv 2407.09121, section 3 and the authors' data.
"""

import dataclasses
import hashlib
import re
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from derta_jax.data.examples import AuthorsRow, Example, Helpful, Triple


@dataclasses.dataclass(frozen=True)
class Row:
    """Text to train on: prompt, then (part of) a harmful answer as context, then the response that is learned.

    `stream` is the objective's word for its kind. `prefix_words` is the k that was drawn. Rows of one `pair` stand side
    by side in one sequence, each cut to half of it. `templated` rows carry their chat template and spacing already.
    Every row is closed with eos when tokenised.
    """

    id: str
    recipe: str
    prompt: str
    response: str
    harmful_prefix: str = ""
    stream: str = "mle"
    prefix_words: int | None = None
    templated: bool = False
    double_space: bool = False
    pair: str | None = None


def example_rng(seed: int, *key: str | int) -> np.random.Generator:
    """A generator that depends on nothing but the seed and the key, so draws survive reordering and resuming."""
    text = "\x1f".join(map(str, (seed, *key)))
    return np.random.default_rng(int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "big"))


def first_words(text: str, count: int) -> str:
    """The text up to the end of its `count`-th word, white space inside kept."""
    ends = [match.end() for match in re.finditer(r"\S+", text)]
    return text[: ends[count - 1]].lstrip() if count else ""


def safe_row(triple: Triple, name: str, recipe: str) -> Row:
    """The safe answer to the bare question."""
    return Row(f"{triple.id}#{name}", recipe, triple.prompt, triple.safe)


def prefix_row(triple: Triple, name: str, recipe: str, seed: int) -> Row:
    """k ~ U{0, …, n} words of the harmful answer before the safe one, drawn from (seed, example id, name)."""
    words = len(triple.harmful.split())
    k = int(example_rng(seed, triple.id, name).integers(0, words + 1))
    prefix = first_words(triple.harmful, k)
    return Row(f"{triple.id}#{name}", recipe, triple.prompt, triple.safe, prefix, prefix_words=k)


def paper_prefix_row(triple: Triple, name: str, recipe: str, seed: int, index: int) -> Row:
    """The authors' draw: no prefix where `index % 3 == 0` (and a double space), else k ~ U{1, …, n-2} words."""
    words = len(triple.harmful.split())
    k = 0 if index % 3 == 0 else int(example_rng(seed, triple.id, name).integers(1, words - 1))
    prefix = first_words(triple.harmful, k)
    row_id = f"{triple.id}#{name}"
    return Row(row_id, recipe, triple.prompt, triple.safe, prefix, prefix_words=k, double_space=k == 0)


def rto_row(triple: Triple, recipe: str) -> Row:
    """The harmful answer, every token of which becomes the refusal label."""
    return Row(f"{triple.id}#rto", recipe, triple.prompt, triple.harmful, stream="rto")


PrefixRow = Callable[[Triple, str, str], Row]

RECIPES: dict[str, Callable[[Triple, PrefixRow], tuple[Row, Row]]] = {
    "vanilla": lambda t, _: (safe_row(t, "safe-0", "vanilla"), safe_row(t, "safe-1", "vanilla")),
    "recaug": lambda t, prefixed: (prefixed(t, "prefix-0", "recaug"), prefixed(t, "prefix-1", "recaug")),
    "rto": lambda t, _: (safe_row(t, "safe-0", "rto"), rto_row(t, "rto")),
    "derta": lambda t, prefixed: (prefixed(t, "prefix-0", "derta"), rto_row(t, "derta")),
}


def rows_from_examples(examples: Iterable[Example], recipe: str, seed: int, paper: bool = False) -> Iterator[Row]:
    """All rows of a dataset under a recipe. With `paper`, triples whose harmful answer has fewer than three words are
    left out whole: the authors' draw has no k for them.
    """
    triples = 0
    for example in examples:
        match example:
            case Helpful():
                yield Row(example.id, "helpful", example.prompt, example.response)
            case AuthorsRow():
                yield _from_authors(example)
            case Triple():
                if paper and len(example.harmful.split()) < 3:
                    continue
                yield from RECIPES[recipe](example, _prefix_sampler(seed, triples, paper))
                triples += 1


def _prefix_sampler(seed: int, index: int, paper: bool) -> PrefixRow:
    if paper:
        return lambda triple, name, recipe: paper_prefix_row(triple, name, recipe, seed, index)
    return lambda triple, name, recipe: prefix_row(triple, name, recipe, seed)


AUTHORS_TEMPLATE_END = re.compile(r"\[[\\/]INST\]")
AUTHORS_EOS = "<|end_of_text|>"


def _from_authors(example: AuthorsRow) -> Row:
    """The prompt ends with the template; what stands behind it in `prefix` is a harmful prefix."""
    marker = AUTHORS_TEMPLATE_END.search(example.prefix)
    end = marker.end() if marker else len(example.prefix)
    return Row(
        id=example.id,
        recipe="authors",
        prompt=example.prefix[:end],
        response=example.text.removesuffix(AUTHORS_EOS),
        harmful_prefix=example.prefix[end:],
        stream="rto" if example.rto else "mle",
        templated=True,
    )
