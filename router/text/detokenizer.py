"""Token ids to text, as they arrive."""

from __future__ import annotations

import codecs
from collections.abc import Sequence


class Detokenizer:
    """Text of one growing sequence of tokens; never a cut character, never more than 3 bytes held back.

    Every token stands for fixed bytes, so the text is the UTF-8 decoding of their concatenation: exactly what decoding
    all token ids at once gives, in constant time a token. One rule differs on purpose: in a run of SentencePiece byte
    tokens with a fault in it, the one-shot decode drops the valid characters of that run too, and this keeps them.
    """

    __slots__ = ("_held", "_token_bytes")

    def __init__(self, token_bytes: Sequence[bytes]) -> None:
        """`token_bytes`: from `Tokenizer`."""
        self._token_bytes = token_bytes
        self._held = b""  # the beginning of a character

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that `token_ids` complete; may be empty. Ids that the tokeniser does not know add nothing."""
        table = self._token_bytes
        return self._decode(b"".join([table[token_id] for token_id in token_ids if token_id < len(table)]), False)

    def flush(self) -> str:
        """The end of the text: U+FFFD for a character that never became whole, else nothing."""
        return self._decode(b"", True)

    def _decode(self, data: bytes, final: bool) -> str:
        # What the standard library's incremental decoder does, without the two Python calls that it costs a token.
        data = self._held + data
        text, used = codecs.utf_8_decode(data, "replace", final)
        self._held = data[used:]
        return text
