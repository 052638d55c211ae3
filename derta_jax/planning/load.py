"""What answering is planned for: so many answers at a time, of such lengths."""

import dataclasses
import re

from derta_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Load:
    """`rows` answers at a time, to prompts of `prompt` tokens, of `new` tokens each."""

    rows: int
    prompt: int
    new: int


def parse_load(text: str) -> Load:
    """`32x512x256`: rows, tokens of a prompt, new tokens."""
    sizes = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)x([1-9]\d*)", text)
    if not sizes:
        raise UserError(f"--generate {text!r}: say rows x prompt tokens x new tokens, as 32x512x256")
    return Load(*map(int, sizes.groups()))
