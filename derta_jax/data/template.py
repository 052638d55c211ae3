"""The text around a prompt, the same in training and evaluation."""

import dataclasses

from derta_jax.interop.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Template:
    """`pattern` holds `{prompt}` once, or is `chat` for the tokenizer's chat template.

    `gap` is what stands between the templated prompt and the answer: the authors' pattern wants a space, a chat
    template ends where the answer begins.
    """

    pattern: str
    tokenizer: Tokenizer

    def __post_init__(self) -> None:
        self.render("")  # a tokenizer without a chat template is found out here

    @property
    def gap(self) -> str:
        return "" if self.pattern == "chat" else " "

    def render(self, prompt: str) -> str:
        return self.tokenizer.chat(prompt) if self.pattern == "chat" else self.pattern.replace("{prompt}", prompt)
