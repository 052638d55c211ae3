"""A judge by its name or its file."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

from derta_jax.errors import UserError, did_you_mean
from derta_jax.evaluation.judging.judge import UNJUDGED, Asked, Judge, Verdict
from derta_jax.evaluation.judging.judge_file import JudgeFile, fill, read_judge_file, read_reply
from derta_jax.evaluation.judging.rules import BUILT_IN

Answer = Callable[[Sequence[str]], list[str]]
"""Whole prompts to what a model says after them."""


def open_judge(spec: str, answer: Answer | None = None) -> Judge:
    """The built-in judge of that name, or the one that a YAML file describes.

    `answer` speaks for the judge's own model, `judge_model(spec)`, where it has one. Raises `UserError`.
    """
    built_in = {judge.name: judge for judge in BUILT_IN}
    if spec in built_in:
        return built_in[spec]
    described = _described(spec)
    if described.model is not None and answer is None:
        raise UserError(
            f"{spec}: model: {described.model} cannot be asked here; serve it and describe the address as `endpoint`"
        )
    return Judge(described.name, described.version, functools.partial(_verdicts, described, answer))


def judge_model(spec: str) -> str | None:
    """The model that has to answer for a judge: its file's `model`; None for all other judges."""
    return None if spec in {judge.name for judge in BUILT_IN} else _described(spec).model


def _described(spec: str) -> JudgeFile:
    if Path(spec).is_file():
        return read_judge_file(spec)
    if Path(spec).suffix in (".yaml", ".yml"):
        siblings = [str(path) for path in Path(spec).parent.glob("*.y*ml")]
        raise UserError(f"no judge file {spec}{did_you_mean(spec, siblings)}")
    names = [judge.name for judge in BUILT_IN]
    raise UserError(f"no judge {spec!r}{did_you_mean(spec, names)} (built in: {', '.join(names)}; or a YAML file)")


def _verdicts(
    described: JudgeFile,
    answer: Answer | None,
    asked: Sequence[Asked],
    progress: Callable[[int], None] = lambda done: None,
) -> list[Verdict]:
    prompts = [fill(described.prompt or "", item) for item in asked]
    if described.endpoint is None:
        assert answer is not None
        texts = answer(prompts)
        progress(len(prompts))
        return [read_reply(described, text, item.response) for text, item in zip(texts, asked, strict=True)]
    # httpx takes a third of a second to import
    from derta_jax.evaluation.judging.endpoint import ask_endpoint

    return [
        Verdict(UNJUDGED, problem=reply.problem)
        if reply.text is None
        else read_reply(described, reply.text, item.response)
        for reply, item in zip(ask_endpoint(described.endpoint, prompts, progress), asked, strict=True)
    ]
