"""A judge described in YAML: which model to ask, with which prompt, and how to read its reply."""

import functools
import re
from pathlib import Path
from typing import Annotated, Any, Self
from urllib.parse import urlsplit

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from derta_jax.errors import UserError, did_you_mean
from derta_jax.evaluation.judging.judge import REFUSED, SAFE, UNJUDGED, UNSAFE, Asked, Verdict, safe_or_refused
from derta_jax.evaluation.judging.refusals import first_person_refusal

PLACES = ("question", "response")

CHAT, TEXT = "/chat/completions", "/completions"


def _a_pattern(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"not a regular expression: {error}") from error
    return text


Pattern = Annotated[str, AfterValidator(_a_pattern)]


class Section(BaseModel):
    """Unknown keys are mistakes; `version: 1` is as good as `version: "1"`."""

    model_config = ConfigDict(extra="forbid", frozen=True, coerce_numbers_to_str=True)


class Endpoint(Section):
    """A model behind an OpenAI-compatible address."""

    url: str = Field(description="whole, with /chat/completions (the prompt is a user's message) or /completions (raw)")
    model: str = Field(min_length=1)
    api_key_env: str | None = Field(None, description="the environment variable that holds the key")
    timeout: float = Field(60.0, gt=0, description="seconds for one answer")
    concurrency: int = Field(8, ge=1, le=256, description="requests at a time")
    retries: int = Field(4, ge=0, le=20, description="after the first try, before an answer stays unjudged")
    parameters: dict[str, Any] = Field({"temperature": 0, "max_tokens": 512}, description="the rest of the request")

    @field_validator("url")
    @classmethod
    def _usable(cls, url: str) -> str:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("must be an http:// or https:// address")
        if not parts.path.endswith(TEXT):
            raise ValueError(f"must end in {CHAT} or {TEXT}, as {url.rstrip('/')}{CHAT}")
        return url

    @property
    def is_chat(self) -> bool:
        return urlsplit(self.url).path.endswith(CHAT)


class Score(Section):
    """A number in the reply, as rubrics give: `unsafe_at` and more is unsafe."""

    pattern: Pattern = Field(description="its one group holds the number")
    unsafe_at: float

    @field_validator("pattern")
    @classmethod
    def _one_group(cls, pattern: str) -> str:
        if (groups := re.compile(pattern).groups) != 1:
            raise ValueError(f"must have one group, around the number (has {groups})")
        return pattern


class JudgeFile(Section):
    """One of `endpoint` and `model`, one of `prompt` and `prompt_file`; `unsafe` and `safe`, or `score`."""

    name: str = Field(min_length=1)
    version: str = Field(min_length=1)
    endpoint: Endpoint | None = None
    model: str | None = Field(None, min_length=1, description="a model for our own generation, as commands take it")
    prompt: str | None = Field(None, description="with {response}, and {question} where the judge is to see it")
    prompt_file: str | None = Field(None, description="the same in a file, looked for beside the YAML file")
    unsafe: Pattern | None = None
    refused: Pattern | None = None
    safe: Pattern | None = None
    score: Score | None = None

    @field_validator("prompt")
    @classmethod
    def _has_its_places(cls, prompt: str) -> str:
        problem = template_problem(prompt)
        if problem:
            raise ValueError(problem)
        return prompt

    @model_validator(mode="after")
    def _one_of_each(self) -> Self:
        for one, other in (("endpoint", "model"), ("prompt", "prompt_file")):
            if (getattr(self, one) is None) == (getattr(self, other) is None):
                raise ValueError(f"needs `{one}` or `{other}`, one of them")
        if self.score is None and (self.unsafe is None or self.safe is None):
            raise ValueError("needs `unsafe` and `safe`, patterns of what the reply says, or `score`")
        if self.score is not None and (self.unsafe is not None or self.safe is not None):
            raise ValueError("`score` says what is unsafe and what is safe: leave out `unsafe` and `safe`")
        return self


def read_judge_file(path: str | Path) -> JudgeFile:
    """What the file says, `prompt_file` read into `prompt`. Raises `UserError` naming file and key."""
    path = Path(path)
    raw = _read_yaml(path)
    try:
        judge = JudgeFile.model_validate(raw)
    except ValidationError as error:
        lines = "\n".join(f"  {_explain(problem)}" for problem in error.errors())
        raise UserError(f"{path}:\n{lines}") from error
    if judge.prompt_file is None:
        return judge
    file = path.parent / judge.prompt_file
    try:
        prompt = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: prompt_file: cannot read {file}: {error}") from error
    if problem := template_problem(prompt):
        raise UserError(f"{path}: prompt_file: {file} {problem}")
    return judge.model_copy(update={"prompt": prompt})


def _read_yaml(path: Path) -> Any:
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(raw, dict):
        raise UserError(f"{path} must hold keys and values, as `name:` and `version:`")
    return raw


def _explain(problem: Any) -> str:
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        sections: dict[str, type[Section]] = {"endpoint": Endpoint, "score": Score}
        section = sections.get(key.rpartition(".")[0], JudgeFile)
        return f"{key}: unknown key{did_you_mean(str(problem['loc'][-1]), section.model_fields)}"
    if problem["type"] == "missing":
        return f"{key}: missing"
    message = problem["msg"].removeprefix("Value error, ")
    if not key or isinstance(problem["input"], dict):
        return f"{key}: {message}".removeprefix(": ")
    return f"{key}: {message} (got {problem['input']!r})"


def template_problem(prompt: str) -> str | None:
    """What is wrong with a prompt: {response} must be in it once, {question} may be; other braces are text."""
    for place in PLACES:
        if (count := prompt.count(f"{{{place}}}")) > 1:
            return f"must have {{{place}}} once (has it {count} times)"
    for name in re.findall(r"\{(\w+)\}", prompt):
        if name not in PLACES and (near := did_you_mean(name, PLACES)):
            return f"has {{{name}}}{near}"
    return None if "{response}" in prompt else "must have {response} where the answer goes"


def fill(prompt: str, asked: Asked) -> str:
    """Question and answer in their places; what looks like a place inside them is left alone."""
    texts = {"question": str(asked.case["prompt"]), "response": asked.response}
    return re.sub(r"\{(question|response)\}", lambda place: texts[place[1]], prompt)


def read_reply(judge: JudgeFile, reply: str, response: str) -> Verdict:
    """`unsafe`, then `refused`, then `safe` or the score: the first that is found. Nothing found is `unjudged`.

    A judge without a pattern for refusals does not tell them from other safe answers: then the refusal rule does.
    """
    for label, pattern in ((UNSAFE, judge.unsafe), (REFUSED, judge.refused), (SAFE, judge.safe)):
        if pattern is not None and _compiled(pattern).search(reply):
            return Verdict(_safe_label(judge, response) if label == SAFE else label, reply)
    if judge.score is not None:
        number = _score(judge.score, reply)
        if number is not None:
            return Verdict(UNSAFE if number >= judge.score.unsafe_at else _safe_label(judge, response), reply)
    return Verdict(UNJUDGED, reply, "no pattern of the judge is in its reply")


def _safe_label(judge: JudgeFile, response: str) -> str:
    return SAFE if judge.refused is not None else safe_or_refused(response, first_person_refusal)


def _score(score: Score, reply: str) -> float | None:
    found = _compiled(score.pattern).search(reply)
    try:
        number = float(found[1]) if found else None
    except (TypeError, ValueError):
        return None
    return number if number == number else None  # not a number


@functools.cache
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern)
