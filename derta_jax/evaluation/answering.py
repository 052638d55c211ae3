"""Prompts to a model's answers: with progress, kept as they are finished, and gone on with after a stop."""

import dataclasses
import hashlib
import json
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from derta_jax.errors import StoppedEarly
from derta_jax.evaluation.generate import Answer, Request, answers
from derta_jax.evaluation.row_log import RowLog
from derta_jax.evaluation.subject import Generation, Subject

TOO_LONG = "too_long"
"""Why a prompt has no answer: the model's context has no room for one token more."""

SECONDS_BETWEEN_LINES = 30.0


def settings_of(subject: Subject, generation: Generation, prompts: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Everything that answers depend on. `prompts` and `weights` are hashes, wherever the model lies."""
    return {
        "model": subject.source.path,
        "weights": fingerprint(subject),
        "dtype": generation.dtype,
        "template": subject.template.pattern,
        "prompts": hashlib.sha256(json.dumps([list(prompt) for prompt in prompts]).encode()).hexdigest()[:16],
        "max_new_tokens": generation.max_new_tokens,
        "temperature": generation.temperature,
        "seed": generation.seed if generation.temperature else None,
    }


def fingerprint(subject: Subject) -> str:
    """16 hex digits that differ where any bit of the parameters or a number of the architecture does."""
    sums = _bit_sums(subject.params)
    parts = [jax.tree_util.keystr(path) + f" {int(value):08x}" for path, value in jax.tree.leaves_with_path(sums)]
    return hashlib.sha256("\n".join([repr(subject.model.config), *parts]).encode()).hexdigest()[:16]


@jax.jit
def _bit_sums(params: Any) -> Any:
    """Of each array the sum of its bits, weighted by place: whole numbers, which are the same on every mesh."""

    def bit_sum(array: jax.Array) -> jax.Array:
        bits = jax.lax.bitcast_convert_type(array, {2: jnp.uint16, 4: jnp.uint32}[array.dtype.itemsize])
        place = sum(
            jax.lax.broadcasted_iota(jnp.uint32, array.shape, axis) * jnp.uint32(2_654_435_761 + 2 * axis)
            for axis in range(array.ndim)
        )
        return jnp.sum(bits.astype(jnp.uint32) * (2 * place + 1), dtype=jnp.uint32)

    return jax.tree.map(bit_sum, params)


def answer_all(
    subject: Subject,
    prompts: Sequence[Sequence[int]],
    generation: Generation,
    log: RowLog | None,
    console: Console,
    title: str,
) -> list[Answer]:
    """The answer to each prompt, in order; those in a `log` are not made again, and new ones are added to it.

    A prompt that leaves the context no room is answered with nothing, for the reason `TOO_LONG`; an answer ends with
    the context. Raises `StoppedEarly` on Ctrl-C.
    """
    context = subject.model.config.max_positions
    kept = log.rows if log else {}
    made = {number: Answer(row["response_token_ids"], row["finish_reason"]) for number, row in kept.items()}
    for number, prompt in enumerate(prompts):
        if len(prompt) >= context:
            made[number] = Answer([], TOO_LONG)
    waiting = [number for number in range(len(prompts)) if number not in made]
    requests = [
        Request(
            prompts[number],
            min(generation.max_new_tokens, context - len(prompts[number])),
            generation.temperature,
            (generation.seed, number),
        )
        for number in waiting
    ]
    if kept:
        console.print(f"{title}: {len(kept):,} of {len(prompts):,} answers are there already", highlight=False)
    try:
        with AnswerProgress(console, title, len(requests)) as progress, jax.set_mesh(subject.mesh):
            for place, answer in answers(
                subject.model, subject.params, requests, subject.stop_ids, generation.batch_size
            ):
                made[waiting[place]] = answer
                if log:
                    log.add(waiting[place], _row(subject, answer))
                progress.answered(len(answer.token_ids))
    except KeyboardInterrupt as error:
        kept_in = (
            f"; {len(made):,} of {len(prompts):,} answers are in {log.path}, the same command goes on" if log else ""
        )
        raise StoppedEarly(f"interrupted{kept_in}") from error
    if too_long := sum(answer.finish_reason == TOO_LONG for answer in made.values()):
        console.print(
            f"[yellow]{title}: {too_long:,} of {len(prompts):,} prompts do not fit the context of {context:,} tokens: "
            f"they have no answer ({TOO_LONG}) and count nowhere",
            highlight=False,
        )
    return [made[number] for number in range(len(prompts))]


def _row(subject: Subject, answer: Answer) -> dict[str, Any]:
    response = subject.tokenizer.decode(answer.token_ids)
    return {"response": response, "response_token_ids": answer.token_ids, "finish_reason": answer.finish_reason}


@dataclasses.dataclass
class AnswerProgress:
    """A bar with tokens/s and an ETA in a terminal; in a log a line every half minute, and one at the end."""

    console: Console
    title: str
    total: int

    def __post_init__(self) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
        )
        self._bar = Progress(
            *columns,
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )
        self._done = self._tokens = 0
        self._started = self._said = time.monotonic()

    def __enter__(self) -> "AnswerProgress":
        self._bar.start()
        self._task = self._bar.add_task(self.title, total=self.total, rate="")
        return self

    def __exit__(self, error: object, *_: object) -> None:
        self._bar.stop()
        if self._done and error is None:
            self.console.print(f"{self.title}: {self._done:,} answers, {self._rate}", highlight=False)

    def answered(self, tokens: int) -> None:
        self._done, self._tokens = self._done + 1, self._tokens + tokens
        self._bar.update(self._task, completed=self._done, rate=self._rate)
        now = time.monotonic()
        if not self.console.is_terminal and now - self._said > SECONDS_BETWEEN_LINES:
            self._said = now
            left = (now - self._started) / self._done * (self.total - self._done)
            self.console.print(
                f"{self.title}: {self._done:,} of {self.total:,} answers, {self._rate}, {left:,.0f} s left",
                highlight=False,
            )

    @property
    def _rate(self) -> str:
        return f"{self._tokens / max(1e-9, time.monotonic() - self._started):,.0f} tokens/s"
