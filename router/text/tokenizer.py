"""The model's tokeniser, over the `tokenizers` library alone (transformers costs seconds to import)."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence, Set
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import tokenizers

from pdserve.errors import ConfigError

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Tokenizer:
    """Text to token ids and back.

    Special tokens written out in a text ("<|im_end|>") become those tokens, wherever the text comes from: the same as
    in HF transformers and vLLM, and what a chat template needs, since its output is one string. So the content of a
    message can close its own turn; whoever must not allow that filters it before.

    Attributes:
        token_bytes: what each token id adds to the text, as UTF-8 bytes that may end inside a character; empty for
            special tokens, which are no part of an answer's text. Index is the token id, length is `vocab_size`.
        special_tokens: text of those that `token_bytes` leaves empty.
        vocab_size: largest token id + 1. A model may have more rows than that.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        """Raises ConfigError when the decoder is none of the supported kinds."""
        # A tokenizer.json can carry these from training; they would cut or pad prompts without a word.
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        added = backend.get_added_tokens_decoder().items()
        self.special_tokens = {token_id: token.content for token_id, token in added if token.special}
        self.token_bytes = _token_bytes(backend, self.special_tokens.keys())
        self.vocab_size = len(self.token_bytes)

    @classmethod
    def from_folder(cls, folder: Path) -> Tokenizer:
        """Reads `tokenizer.json`. Raises ConfigError when it is missing, damaged or of an unsupported kind."""
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ConfigError(f"{path} is missing: the model folder must hold a tokenizer.json.")
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception for any fault of the file
            raise ConfigError(f"{path} cannot be read as a tokeniser: {error}.") from error
        return cls(backend)

    def encode(self, text: str, *, add_special: bool) -> list[int]:
        """Token ids of `text`.

        Args:
            add_special: add what the model expects around a bare text, such as a BOS token. False for the output of a
                chat template, which writes its own.
        """
        # The batch form lets other threads run meanwhile and skips offsets; the single form does neither.
        return self._backend.encode_batch_fast([text], add_special_tokens=add_special)[0].ids

    @cached_property
    def literals(self) -> tuple[bytes, ...]:
        """`token_bytes` with special tokens written out."""
        return tuple(
            self.special_tokens[token_id].encode() if token_id in self.special_tokens else token
            for token_id, token in enumerate(self.token_bytes)
        )

    @lru_cache(maxsize=4)  # noqa: B019 - a process has one tokeniser
    def token_bytes_with(self, special: frozenset[str]) -> tuple[bytes, ...]:
        """`token_bytes`, with these special tokens written out."""
        table = list(self.token_bytes)
        for token_id, content in self.special_tokens.items():
            if content in special:
                table[token_id] = content.encode()
        return tuple(table)

    def literal(self, token_id: int) -> bytes:
        """Empty for an id that is none."""
        return self.literals[token_id] if token_id < self.vocab_size else b""

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of `token_ids` without special tokens; unknown ids are skipped."""
        return self._backend.decode(list(token_ids), skip_special_tokens=True)


def _token_bytes(backend: tokenizers.Tokenizer, special: Set[int]) -> tuple[bytes, ...]:
    piece_bytes = _piece_decoder(json.loads(backend.to_str())["decoder"])
    vocab = backend.get_vocab(with_added_tokens=True)
    table = [b""] * (max(vocab.values(), default=-1) + 1)
    for piece, token_id in vocab.items():
        if token_id not in special:
            table[token_id] = piece_bytes(piece)
    return tuple(table)


def _piece_decoder(decoder: dict[str, Any] | None) -> Callable[[str], bytes]:
    """How a piece of the vocabulary maps to bytes, from the `decoder` of a tokenizer.json."""
    steps = [] if decoder is None else decoder.get("decoders", [decoder])
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return _byte_level(_byte_alphabet())
    # `Strip` removes the space before the first word of a whole text; an answer continues its prompt and keeps it.
    if "ByteFallback" in kinds and set(kinds) <= {"Replace", "ByteFallback", "Fuse", "Strip"}:
        replacing = [step for step in steps if step["type"] == "Replace"]
        if all("String" in step["pattern"] for step in replacing):
            return _byte_fallback([(step["pattern"]["String"], step["content"]) for step in replacing])
    raise ConfigError(
        f"The tokeniser's decoder {kinds or 'null'} is not supported: ByteLevel (GPT-2, Llama 3, SmolLM) and "
        "ByteFallback (SentencePiece, Llama 2) are."
    )


def _byte_alphabet() -> dict[str, int]:
    """The printable stand-ins of byte-level BPE: a byte that is printable Latin-1 stands for itself, the others for the
    code points from 256 on, in order (GPT-2, `bytes_to_unicode`)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in printable)
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


def _byte_level(alphabet: dict[str, int]) -> Callable[[str], bytes]:
    def piece_bytes(piece: str) -> bytes:
        try:
            return bytes([alphabet[char] for char in piece])
        except KeyError:  # an added token stands as it is
            return piece.encode()

    return piece_bytes


def _byte_fallback(replacements: list[tuple[str, str]]) -> Callable[[str], bytes]:
    def piece_bytes(piece: str) -> bytes:
        for old, new in replacements:
            piece = piece.replace(old, new)
        byte = _BYTE_TOKEN.fullmatch(piece)
        return bytes([int(byte[1], 16)]) if byte else piece.encode()

    return piece_bytes
