"""A Hugging Face tokenizer with what training depends on checked: eos, offsets, a single refusal token."""

import codecs
import dataclasses
import functools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from derta_jax.errors import UserError

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
BYTE = re.compile(r"<0x([0-9A-F]{2})>")
"""SentencePiece's name for a byte that is a token of its own."""
CLEANED = 8
"""More characters than transformers' cleaning of spaces looks at in one place."""


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """`hf` is the transformers tokenizer; `bos_id` is None where the tokenizer has no beginning-of-sequence token."""

    hf: Any
    directory: Path
    eos_id: int
    bos_id: int | None

    def encode(self, text: str) -> list[int]:
        """Token ids of the text alone: no bos, no eos added."""
        return self.hf(text, add_special_tokens=False)["input_ids"]

    def encode_with_offsets(self, texts: Sequence[str]) -> tuple[list[list[int]], list[list[tuple[int, int]]]]:
        """Token ids and, for each token, its (start, end) characters in the text."""
        encoded = self.hf(list(texts), add_special_tokens=False, return_offsets_mapping=True)
        return encoded["input_ids"], encoded["offset_mapping"]

    def prompt_ids(self, text: str) -> list[int]:
        """The ids a model reads before it answers: bos (unless the text starts with it), then the text."""
        return [*self.leading_ids(text), *self.encode(text)]

    def leading_ids(self, text: str) -> list[int]:
        """bos, where the tokenizer has one and the (chat-templated) text does not bring its own."""
        if self.bos_id is None or text.startswith(self.hf.bos_token):
            return []
        return [self.bos_id]

    def decode(self, token_ids: Sequence[int]) -> str:
        return self.hf.decode(list(token_ids), skip_special_tokens=True)

    def decode_settled(self, token_ids: Sequence[int]) -> str:
        """The part of `decode`'s text that stays as it is whatever tokens follow.

        A character lasts from its last byte on. Bytes that are tokens of their own wait for a token that is none: a
        SentencePiece decoder reads a run of them all or not at all.
        """
        settled = list(token_ids)
        while settled and (settled[-1] in self._special_ids or self._is_byte(settled[-1])):
            settled.pop()
        text = self.decode(settled).rstrip("\N{REPLACEMENT CHARACTER}")
        return text[:-CLEANED] if self.hf.clean_up_tokenization_spaces else text

    @functools.cached_property
    def _special_ids(self) -> frozenset[int]:
        return frozenset(self.hf.all_special_ids)

    def _is_byte(self, token_id: int) -> bool:
        return BYTE.fullmatch(self.hf.convert_ids_to_tokens(token_id) or "") is not None

    def token_texts(self, token_ids: Sequence[int]) -> list[str]:
        """How each token reads, white space included, so that joined they read like the text.

        A character whose bytes are spread over several tokens stands where it ends.
        """
        # embeddings are often padded: a model may give an id that the vocabulary does not have
        pieces = [piece or "" for piece in self.hf.convert_ids_to_tokens(list(token_ids))]
        if type(self.hf.backend_tokenizer.model).__name__ == "WordLevel":
            return [" " * (place > 0) + piece for place, piece in enumerate(pieces)]
        byte_level = "ByteLevel" in repr(self.hf.backend_tokenizer.decoder)
        added = self.hf.added_tokens_decoder
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        return [
            decoder.decode(_piece_bytes(piece, byte_level and token_id not in added))
            for piece, token_id in zip(pieces, token_ids, strict=True)
        ]

    def chat(self, prompt: str) -> str:
        """The prompt in the tokenizer's own chat template, up to where the answer starts."""
        return self.chat_turns([_turn("user", prompt)])

    def chat_turns(self, turns: Sequence[Mapping[str, str]], go_on: bool = False) -> str:
        """Turns (`role`, `content`) in the chat template, up to where the next answer starts.

        With `go_on` up to where the last turn ends, for it to be gone on with. Raises `UserError` for turns that the
        template refuses.
        """
        if not self.hf.chat_template:
            raise UserError(f"the tokenizer in {self.directory} has no chat template: set data.template")
        try:
            return self.hf.apply_chat_template(
                [dict(turn) for turn in turns],
                tokenize=False,
                add_generation_prompt=not go_on,
                continue_final_message=go_on,
            )
        except jinja2.TemplateError as error:
            raise UserError(f"the tokenizer's chat template does not take these messages: {error}") from error
        except ValueError as error:
            raise UserError("the tokenizer's chat template does not show the last message as it is") from error

    def chat_gap(self) -> str:
        """What the chat template puts between the prompt's end and the answer."""
        head, answer = self.chat("question"), "answer"
        turns = [_turn("user", "question"), _turn("assistant", answer)]
        whole = self.hf.apply_chat_template(turns, tokenize=False)
        return whole[len(head) : whole.index(answer, len(head))] if whole.startswith(head) else ""


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def load_tokenizer(directory: str | Path) -> Tokenizer:
    """Read the tokenizer files of a local Hugging Face directory; no code from the directory is run.

    Raises `UserError` when there is none, when it cannot map tokens to characters, or when it has no eos.
    """
    from transformers import AutoTokenizer  # takes 1.5 s: not at import time

    directory = Path(directory)
    if not any((directory / name).is_file() for name in TOKENIZER_FILES):
        raise UserError(f"no tokenizer files in {directory} (looked for {', '.join(TOKENIZER_FILES[:3])})")
    try:
        hf = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # a broken tokenizer.json is a bare `Exception` from the Rust library
        raise UserError(f"the tokenizer in {directory} cannot be read: {error}") from error
    if not hf.is_fast:
        raise UserError(f"the tokenizer in {directory} cannot tell token offsets: it needs a tokenizer.json")
    if hf.eos_token_id is None:
        raise UserError(
            f"the tokenizer in {directory} has no eos token, so answers could not end: "
            "set eos_token in its tokenizer_config.json"
        )
    return Tokenizer(hf, directory, hf.eos_token_id, hf.bos_token_id)


def refusal_token_id(tokenizer: Tokenizer, word: str) -> int:
    """The id of the single vocabulary piece that is `word`; a leading space asks for the piece that starts a word.

    `Sorry` is 19701 for LLaMA 3 and `Sorry` without `▁` for Mistral; ` Sorry` is 33386 and `▁Sorry`.
    Raises `UserError` when the vocabulary has no such piece.
    """
    vocabulary = tokenizer.hf.get_vocab()
    bare = word.strip()
    candidates = [mark + bare for mark in ("Ġ", "▁")] if word.startswith(" ") else [bare]
    for piece in candidates:
        if piece in vocabulary:
            return vocabulary[piece]
    pieces = tokenizer.hf.convert_ids_to_tokens(tokenizer.encode(bare))
    raise UserError(
        f"the refusal word {word!r} is not a single token of the tokenizer in {tokenizer.directory} "
        f"(it becomes {pieces}): set objective.refusal_token"
    )


def stop_token_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Every id that ends an answer: the tokenizer's eos and those of `generation_config.json`.

    Raises `UserError` when that file is not a JSON object.
    """
    ids = {tokenizer.eos_id}
    file = tokenizer.directory / "generation_config.json"
    if file.is_file():
        try:
            extra = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
        except (ValueError, AttributeError) as error:
            raise UserError(f"{file} is not valid: {error}") from error
        ids.update(extra if isinstance(extra, list) else [extra] if isinstance(extra, int) else [])
    return tuple(sorted(ids))


@functools.lru_cache(maxsize=1)
def _byte_decoder() -> dict[str, int]:
    """GPT-2's printable stand-ins for bytes, as byte-level BPE vocabularies spell them."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _piece_bytes(piece: str, byte_level: bool) -> bytes:
    """The bytes that a vocabulary piece stands for: byte-level BPE, or SentencePiece with its `<0x0A>` for bytes."""
    table = _byte_decoder()
    if byte_level and table.keys() >= set(piece):
        return bytes(table[char] for char in piece)
    if byte := BYTE.fullmatch(piece):
        return bytes.fromhex(byte[1])
    return piece.replace("▁", " ").encode()
