"""The bodies of requests: what is understood of OpenAI's, what is passed over, and what is refused by name.

A parameter that would change the answer, and that this server does not know, is refused: an answer is never other than
what was asked for. Null is as good as left out.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from derta_jax.errors import did_you_mean

IGNORED = {
    "metadata",
    "parallel_tool_calls",
    "prompt_cache_key",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
}
"""What does not change an answer."""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "ignore_eos": (False,),
    "logit_bias": ({},),
    "min_p": (0,),
    "min_tokens": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "skip_special_tokens": (True,),
    "top_k": (-1, 0),
    "top_p": (1,),
}
"""What would change an answer, but for these values."""

NEUTRAL_IN_CHAT: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "function_call": ("auto", "none"),
    "functions": ([],),
    "logprobs": (False,),
    "modalities": (["text"],),
    "prediction": (),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "tool_choice": ("auto", "none"),
    "tools": ([],),
    "top_logprobs": (0,),
    "verbosity": (),
    "web_search_options": (),
}

NEUTRAL_IN_COMPLETIONS: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "logprobs": (),
    "suffix": ("",),
}

LONGEST_STOP = 256
"""Characters."""
MOST_CHOICES = 128


def _whole(text: str) -> str:
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise _refused("half of a surrogate pair is no character")
    return text


Text = Annotated[str, AfterValidator(_whole)]


class StreamOptions(BaseModel):
    """`include_usage` sends the counts of tokens as the last chunk."""

    model_config = ConfigDict(strict=True)

    include_usage: bool = False


class Asked(BaseModel):
    """What both kinds of requests have in common."""

    model_config = ConfigDict(strict=True)
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = NEUTRAL

    model: str | None = None
    max_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(1.0, ge=0, le=2, allow_inf_nan=False)
    seed: int | None = None
    stop: list[Annotated[str, Field(min_length=1, max_length=LONGEST_STOP)]] = Field([], max_length=16)
    n: int = Field(1, ge=1, le=MOST_CHOICES)
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()

    @model_validator(mode="before")
    @classmethod
    def _known_parameters(cls, body: Any) -> Any:
        return _known(body, cls) if isinstance(body, dict) else body

    @field_validator("stop", mode="before")
    @classmethod
    def _stops(cls, stop: Any) -> Any:
        return [stop] if isinstance(stop, str) else stop


class Message(BaseModel):
    """A turn of a conversation, in text alone."""

    model_config = ConfigDict(strict=True)

    role: Literal["system", "user", "assistant"]
    content: Text

    @model_validator(mode="before")
    @classmethod
    def _text_alone(cls, message: Any) -> Any:
        if not isinstance(message, dict):
            return message
        if extra := [key for key, value in message.items() if value and key not in cls.model_fields]:
            raise _refused(f"a message cannot have {extra[0]!r} here", "unsupported_parameter")
        role = "system" if message.get("role") == "developer" else message.get("role")
        return {"role": role, "content": _joined(message.get("content"))}


class ChatAsked(Asked):
    """A body for `/v1/chat/completions`; `continue_final_message` has the answer begun by the last message."""

    neutral = NEUTRAL | NEUTRAL_IN_CHAT

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    continue_final_message: bool = False
    add_generation_prompt: bool | None = None

    @model_validator(mode="after")
    def _consistent(self) -> "ChatAsked":
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise _refused("max_tokens and max_completion_tokens are one thing: give one of them", param="max_tokens")
        if self.add_generation_prompt not in (None, not self.continue_final_message):
            raise _refused("either the last message goes on or a new one begins", param="add_generation_prompt")
        if self.continue_final_message and self.messages[-1].role != "assistant":
            raise _refused("only the assistant's last message can go on", param="continue_final_message")
        return self


class CompletionAsked(Asked):
    """A body for `/v1/completions`: raw text to go on with, or its token ids; one prompt or several."""

    neutral = NEUTRAL | NEUTRAL_IN_COMPLETIONS

    prompt: Text | list[Text] | list[int] | list[list[int]]

    @field_validator("prompt", mode="wrap")
    @classmethod
    def _one_message(cls, prompt: Any, validate: Any) -> Any:
        try:
            validated = validate(prompt)
        except ValueError:
            validated = []
        if validated == []:
            raise _refused("prompt must be text, token ids, or a list of one of these")
        return validated

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """One or more, each as text or as token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        return [self.prompt] if isinstance(self.prompt[0], int) else self.prompt  # type: ignore[list-item, return-value]


def _known(body: Mapping[str, Any], kind: type[Asked]) -> dict[str, Any]:
    """The body without what means nothing; raises for what would, and for what nobody knows."""
    body = {key: value for key, value in body.items() if value is not None and key not in IGNORED}
    known = {}
    for key, value in body.items():
        if key in kind.model_fields:
            known[key] = value
        elif key not in kind.neutral:
            hint = did_you_mean(key, kind.model_fields)
            raise _refused(f"there is no parameter {key!r}{hint}", "unknown_parameter", key)
        elif value not in kind.neutral[key]:
            allowed = " or ".join(repr(value) for value in kind.neutral[key])
            other = f": leave it out, or give {allowed}" if allowed else ": leave it out"
            raise _refused(f"{key} is not supported{other}", "unsupported_parameter", key)
    return known


def _refused(message: str, code: str = "invalid_value", param: str | None = None) -> PydanticCustomError:
    """`param` is for where pydantic does not know it: in the checks of a whole body."""
    if param is not None:
        param = param.encode("utf-8", "backslashreplace").decode()  # pydantic's errors cannot hold half a character
    return PydanticCustomError(code, "{message}", {"message": message, "param": param})  # type: ignore[arg-type]


def _joined(content: Any) -> Any:
    """Content in parts, as one text; what is not text is left for the check of its type."""
    if not isinstance(content, list):
        return content
    if any(not isinstance(part, dict) or part.get("type") != "text" for part in content):
        raise _refused("only text can be read: no images, audio or files", "unsupported_parameter")
    texts = [part.get("text") for part in content]
    return "".join(texts) if all(isinstance(text, str) for text in texts) else texts
