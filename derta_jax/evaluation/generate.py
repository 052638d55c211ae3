"""KV-cached generation, greedy or sampled: prompts of mixed length pass through slots of static shape."""

import dataclasses
import itertools
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from derta_jax.evaluation.slots import Prompts, advance, enter, free_slots, keep
from derta_jax.models.decoder import Decoder
from derta_jax.models.sharding import mesh_axis_size

SMALLEST_BUCKET = 16
STEPS_AT_A_TIME = 8
"""Tokens of each row between two looks at who is done."""
REFILL = 8
"""A free share of the slots, one in so many, is filled as soon as it is free."""
NARROWER, WIDE = 4, 32
"""`WIDE` slots or more become so many times fewer for the last answers, on a CPU: its products take as long as they
have rows. An accelerator waits for the weights, however many slots there are.
"""


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt of at least one token and how to answer it; temperature 0 is greedy, `seed` is of this request alone."""

    prompt_ids: Sequence[int]
    max_new_tokens: int
    temperature: float = 0.0
    seed: tuple[int, int] = (0, 0)


@dataclasses.dataclass(frozen=True)
class Answer:
    """`token_ids` without the stop token; `finish_reason` is `stop` or `length`."""

    token_ids: list[int]
    finish_reason: str


@dataclasses.dataclass(frozen=True)
class News:
    """What a request was given in one go; `finish_reason` is None while more may follow."""

    name: Any
    token_ids: list[int]
    finish_reason: str | None


class Batch:
    """Requests that are answered together, each in a slot of its own; they come and go at any time.

    `size` slots, each for at most `context` tokens of a prompt and its answer. The model is `unrolled`, and used under
    the mesh that its `params` lie on.
    """

    def __init__(self, model: Decoder, params: Any, stop_ids: Sequence[int], size: int, context: int):
        self._model, self._params, self._stop_ids = model, params, tuple(stop_ids)
        self.size = _evenly(size)
        self._at_once = _evenly(-(-self.size // REFILL))
        self._slots = free_slots(model, self.size, -(-context // SMALLEST_BUCKET) * SMALLEST_BUCKET)
        self._names: dict[int, Any] = {}

    @property
    def free(self) -> int:
        return self.size - len(self._names)

    @property
    def running(self) -> bool:
        return bool(self._names)

    def admit(self, requests: Mapping[Any, Request]) -> list[News]:
        """Give named requests a slot each, as many as are `free`; tells the first token of each."""
        by_length: dict[int, deque[tuple[Any, Request]]] = {}
        for name, request in requests.items():
            by_length.setdefault(bucket(len(request.prompt_ids)), deque()).append((name, request))
        news = []
        for waiting in by_length.values():
            while waiting:
                # two shapes are compiled for a length of prompts: all slots, and a few
                width = self.size if len(waiting) > self.size // 2 else self._at_once
                news += self._enter([waiting.popleft() for _ in range(min(width, len(waiting)))], width)
        return news

    def advance(self, steps: int = STEPS_AT_A_TIME) -> list[News]:
        """Up to `steps` more tokens for each request."""
        self._slots, made = advance(self._model, self._params, self._slots, steps, self._stop_ids)
        rows = np.asarray(made)
        left = np.asarray(self._slots.left)
        return [
            self._tell(slot, [token for token in rows[slot].tolist() if token >= 0], left[slot])
            for slot in [*self._names]
        ]

    def drop(self, name: Any) -> None:
        """Nobody waits for this request any more."""
        slot = next(slot for slot, each in self._names.items() if each == name)
        self._slots = self._slots._replace(left=self._slots.left.at[slot].set(0))
        del self._names[slot]

    def narrow(self) -> None:
        """Give up slots that nobody needs, where this makes the last answers faster."""
        size = _evenly(self.size // NARROWER)
        if jax.default_backend() != "cpu" or self.size < WIDE or not 0 < len(self._names) <= size < self.size:
            return
        free = (slot for slot in range(self.size) if slot not in self._names)
        kept = [*self._names, *itertools.islice(free, size - len(self._names))]
        self._slots = keep(self._slots, np.array(kept, np.int32))
        self._names = dict(enumerate(self._names.values()))
        self.size = size

    def _enter(self, entering: Sequence[tuple[Any, Request]], width: int) -> list[News]:
        taken = [slot for slot in range(self.size) if slot not in self._names][: len(entering)]
        nobody = width - len(entering)
        requests = [request for _, request in entering]
        requests += requests[:1] * nobody
        token_ids, lengths = pad_right([request.prompt_ids for request in requests])
        self._slots, first = enter(
            self._model,
            self._params,
            self._slots,
            Prompts(
                token_ids,
                lengths,
                np.array(taken + [self.size] * nobody, np.int32),
                np.array([request.max_new_tokens for request in requests], np.int32),
                np.array([request.temperature for request in requests], np.float32),
                _keys([request.seed for request in requests]),
            ),
            self._stop_ids,
        )
        self._names |= zip(taken, (name for name, _ in entering), strict=True)
        left = np.asarray(self._slots.left)
        return [
            self._tell(slot, [token], left[slot])
            for slot, token in zip(taken, np.asarray(first).tolist(), strict=False)
        ]

    def _tell(self, slot: int, token_ids: list[int], left: int) -> News:
        name = self._names[slot]
        if left:
            return News(name, token_ids, None)
        del self._names[slot]
        stopped = bool(token_ids) and token_ids[-1] in self._stop_ids
        return News(name, token_ids[:-1], "stop") if stopped else News(name, token_ids, "length")


def answers(
    model: Decoder,
    params: Any,
    requests: Sequence[Request],
    stop_ids: Sequence[int],
    batch_size: int = 32,
) -> Iterator[tuple[int, Answer]]:
    """Each request's place in the list and its answer, as they are finished.

    Prompts are padded on the right to a power of two, so that few shapes are compiled, and come in the order of their
    lengths; those that need about as much of a cache share a batch, which ends but once in a few long answers. Whatever
    shares the batch, an answer is the same.
    """
    lengths = [bucket(len(request.prompt_ids)) for request in requests]
    contexts = [length + request.max_new_tokens for length, request in zip(lengths, requests, strict=True)]
    together: dict[int, list[int]] = {}
    for place in sorted(range(len(requests)), key=lambda place: (lengths[place], place)):
        together.setdefault(bucket(contexts[place]), []).append(place)
    for _, places in sorted(together.items()):
        context = max(contexts[place] for place in places)
        batch = Batch(model, params, stop_ids, min(batch_size, len(places)), context)
        yield from _drain(batch, {place: requests[place] for place in places})


def _drain(batch: Batch, requests: Mapping[int, Request]) -> Iterator[tuple[int, Answer]]:
    waiting = deque(requests)
    made: dict[int, list[int]] = {place: [] for place in requests}

    def finished(news: Sequence[News]) -> Iterator[tuple[int, Answer]]:
        for item in news:
            made[item.name] += item.token_ids
            if item.finish_reason:
                yield item.name, Answer(made.pop(item.name), item.finish_reason)

    while waiting or batch.running:
        if waiting and batch.free >= min(len(waiting), max(1, batch.size // REFILL)):
            entering = [waiting.popleft() for _ in range(min(batch.free, len(waiting)))]
            yield from finished(batch.admit({place: requests[place] for place in entering}))
        if not waiting:
            batch.narrow()
        if batch.running:
            yield from finished(batch.advance())


def generate(
    model: Decoder,
    params: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    stop_ids: Sequence[int],
    batch_size: int = 32,
    temperature: float = 0.0,
    seed: int = 0,
    progress: Callable[[int], None] = lambda count: None,
) -> list[Answer]:
    """One answer for each prompt (token ids, at least one), in order, by a model that is `unrolled`. `progress` is told
    how many are done.

    Sampling is keyed by (seed, place of the prompt).
    """
    requests = [Request(prompt, max_new_tokens, temperature, (seed, place)) for place, prompt in enumerate(prompts)]
    made: dict[int, Answer] = {}
    for place, answer in answers(model, params, requests, stop_ids, batch_size):
        made[place] = answer
        progress(len(made))
    return [made[place] for place in range(len(prompts))]


def _evenly(slots: int) -> int:
    """As many at least, and the same number on each device."""
    multiple = mesh_axis_size("batch")
    return -(-slots // multiple) * multiple


def bucket(length: int) -> int:
    """The power of two that a prompt of this length is padded to."""
    return max(SMALLEST_BUCKET, 1 << (length - 1).bit_length())


def pad_right(prompts: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Token ids [n, P], padded on the right, and lengths [n]; P is a power of two."""
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    tokens = np.zeros((len(prompts), bucket(int(lengths.max()))), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    return tokens, lengths


@jax.jit
def _fold(seeds: jax.Array) -> jax.Array:
    return jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(seed[0]), seed[1]))(seeds)


def _keys(seeds: Sequence[tuple[int, int]]) -> jax.Array:
    """A random key for each (seed, place)."""
    return _fold(jnp.array(seeds, jnp.uint32))
