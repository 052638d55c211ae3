"""Inspect's model `derta/DIR`: its concurrent requests are answered in one batch that they join and leave."""

import math
import time
from typing import Any

import anyio
from inspect_ai.model import (
    ChatCompletionChoice,
    ChatMessage,
    ChatMessageAssistant,
    GenerateConfig,
    ModelAPI,
    ModelOutput,
    ModelUsage,
    StopReason,
)
from inspect_ai.tool import ToolChoice, ToolInfo

from derta_jax.errors import UserError
from derta_jax.evaluation.adapters.conversation import conversation_text
from derta_jax.evaluation.adapters.desk import Desk, Seeds
from derta_jax.evaluation.adapters.opening import conversation_template, open_model, refuse_unknown
from derta_jax.evaluation.adapters.texts import Question, Reply
from derta_jax.evaluation.generate import Request

OPTIONS = ("dtype", "template", "mesh", "batch_size")
DEFAULT_MAX_TOKENS = 2048
DEFAULT_BATCH_SIZE = 32

OURS = frozenset({"max_tokens", "temperature", "seed", "stop_seqs"})
"""Fields of a `GenerateConfig` that say how an answer is made."""
INSPECTS = frozenset(
    {
        "max_retries",
        "timeout",
        "attempt_timeout",
        "stream_idle_timeout",
        "max_connections",
        "adaptive_connections",
        "system_message",
        "parallel_tool_calls",
        "internal_tools",
        "max_tool_output",
        "cache_prompt",
        "fail_on_refusal",
        "reasoning_history",
        "cache",
        "batch",
    }
)
"""Fields that Inspect sees to, or that are about what we do not have."""
CHANGE_NOTHING = {"top_p": 1, "num_choices": 1, "logprobs": False}


class DertaAPI(ModelAPI):
    """A model of any kind that `derta evaluate` knows, in the template that it was trained with.

    Decodes greedily unless a temperature is given. The last turn may be an assistant's: the answer goes on with it.
    Raises `UserError` for tools, and for what it does not support.
    """

    def __init__(
        self,
        model_name: str,
        base_url: str | None = None,
        api_key: str | None = None,
        config: GenerateConfig = GenerateConfig(),  # noqa: B008  Inspect's own signature
        dtype: str = "bfloat16",
        template: str | None = None,
        mesh: Any = None,
        batch_size: int | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__(model_name, base_url, api_key, [], config)
        refuse_unknown(unknown, OPTIONS, "model argument")
        self.batch_size = batch_size or config.max_connections or DEFAULT_BATCH_SIZE
        self.subject = open_model(model_name, self.batch_size, dtype, template, mesh)
        self.template = conversation_template(self.subject, template)
        self._desk = Desk(self.subject, self.batch_size)
        self._seeds: dict[int, Seeds] = {}
        self._waiting = anyio.CapacityLimiter(math.inf)

    def close(self) -> None:
        self._desk.close()

    def max_tokens(self) -> int:
        return DEFAULT_MAX_TOKENS

    def max_connections(self) -> int:
        return self.batch_size

    def collapse_user_messages(self) -> bool:
        return True

    async def count_text_tokens(self, text: str) -> int:
        return len(self.subject.tokenizer.encode(text))

    async def generate(
        self, input: list[ChatMessage], tools: list[ToolInfo], tool_choice: ToolChoice, config: GenerateConfig
    ) -> ModelOutput:
        if tools:
            raise UserError(f"{self.model_name} calls no tools, but the task offers {', '.join(t.name for t in tools)}")
        _check(config)
        text = conversation_text([_turn(message) for message in input], self.template)
        prompt_ids = self.subject.tokenizer.prompt_ids(text)
        room = self.subject.source.config.max_positions - len(prompt_ids)
        if room < 1:
            return self._too_long(len(prompt_ids))
        wanted = config.max_tokens or DEFAULT_MAX_TOKENS
        seed = self._seeds.setdefault(config.seed or 0, Seeds(config.seed or 0)).next(prompt_ids)
        request = Request(prompt_ids, min(wanted, room), config.temperature or 0.0, seed)
        started = time.monotonic()
        reply = await self._reply(Question(request, tuple(stop for stop in config.stop_seqs or () if stop)))
        reason: StopReason = "stop"
        if reply.finish_reason == "length":
            reason = "max_tokens" if wanted <= room else "model_length"
        return self._output(reply.text, reason, len(prompt_ids), reply.tokens, time.monotonic() - started)

    async def _reply(self, question: Question) -> Reply:
        future = self._desk.ask(question)
        try:
            return await anyio.to_thread.run_sync(future.result, abandon_on_cancel=True, limiter=self._waiting)
        finally:
            future.cancel()  # of consequence only where nobody waits any more

    def _too_long(self, tokens: int) -> ModelOutput:
        output = self._output("", "model_length", tokens, 0, 0.0)
        positions = self.subject.source.config.max_positions
        output.error = f"the conversation is {tokens:,} tokens long, and the model has {positions:,} positions"
        return output

    def _output(self, text: str, reason: StopReason, read: int, made: int, seconds: float) -> ModelOutput:
        message = ChatMessageAssistant(content=text, model=self.model_name, source="generate")
        return ModelOutput(
            model=self.model_name,
            choices=[ChatCompletionChoice(message=message, stop_reason=reason)],
            usage=ModelUsage(input_tokens=read, output_tokens=made, total_tokens=read + made),
            time=seconds,
        )


def _turn(message: ChatMessage) -> dict[str, str]:
    if isinstance(message.content, list) and (kinds := {part.type for part in message.content} - {"text"}):
        raise UserError(f"a turn of {message.role!r} holds {', '.join(sorted(kinds))}: only text is supported")
    return {"role": message.role, "content": message.text}


def _check(config: GenerateConfig) -> None:
    """Raise `UserError` for fields that ask for what we do not do."""
    fields = config.model_dump(exclude_none=True, exclude=set(OURS | INSPECTS))
    if wrong := [f"{name}={value!r}" for name, value in fields.items() if value != CHANGE_NOTHING.get(name)]:
        raise UserError(f"generation options: {', '.join(wrong)}: not supported, only {', '.join(sorted(OURS))} are")
    for name, least in (("max_tokens", 1), ("temperature", 0), ("seed", 0)):
        if (value := getattr(config, name)) is not None and value < least:
            raise UserError(f"generation options: {name} must be at least {least} (got {value})")
