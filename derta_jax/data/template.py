"""The text around a prompt, the same in training and evaluation."""

import dataclasses
import functools

from derta_jax.interop.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Template:
    """`pattern` holds `{prompt}` once, or is `chat` for the tokenizer's chat template.

    `gap` is what stands between the templated prompt and the answer: a space, or what the chat template has there.
    """

    pattern: str
    tokenizer: Tokenizer

    def __post_init__(self) -> None:
        self.render("")  # a tokenizer without a chat template is found out here

    @property
    def gap(self) -> str:
        return self._chat_gap if self.pattern == "chat" else " "

    @functools.cached_property
    def _chat_gap(self) -> str:
        return self.tokenizer.chat_gap()

    def render(self, prompt: str) -> str:
        return self.tokenizer.chat(prompt) if self.pattern == "chat" else self.pattern.replace("{prompt}", prompt)
