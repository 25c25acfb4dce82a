"""Log probabilities in OpenAI's two shapes, and the prompt's in vLLM's."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from pdserve.request import TokenLogprobs
from router.text.detokenizer import Detokenizer
from router.text.tokenizer import Tokenizer

Payload = dict[str, Any]


class LogprobsWriter(ABC):
    """Of one choice, as its tokens come."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    @abstractmethod
    def write(self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs | None]) -> Payload:
        """The `logprobs` of a choice, for these tokens; None for a token that nothing comes before."""


class ChatLogprobs(LogprobsWriter):
    def write(self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs | None]) -> Payload:
        content = [
            {
                **self._token(token_id, each.logprob),
                "top_logprobs": [
                    self._token(top_id, logprob)
                    for top_id, logprob in zip(each.top_ids, each.top_logprobs, strict=True)
                ],
            }
            for token_id, each in zip(token_ids, logprobs, strict=True)
            if each is not None
        ]
        return {"content": content, "refusal": None}

    def _token(self, token_id: int, logprob: float) -> Payload:
        literal = self._tokenizer.literal(token_id)
        return {"token": literal.decode(errors="replace"), "logprob": logprob, "bytes": list(literal)}


class CompletionLogprobs(LogprobsWriter):
    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__(tokenizer)
        self._detokenizer = Detokenizer(tokenizer.literals)
        self._offset = 0  # characters of the text before the next token

    def write(self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs | None]) -> Payload:
        offsets = []
        for token_id in token_ids:
            offsets.append(self._offset)
            self._offset += len(self._detokenizer.push((token_id,)))
        return {
            "tokens": [self._text(token_id) for token_id in token_ids],
            "token_logprobs": [None if each is None else each.logprob for each in logprobs],
            "top_logprobs": [
                self._likeliest(token_id, each) for token_id, each in zip(token_ids, logprobs, strict=True)
            ],
            "text_offset": offsets,
        }

    def _likeliest(self, token_id: int, logprobs: TokenLogprobs | None) -> dict[str, float] | None:
        """By text; the token itself is always among them."""
        if logprobs is None:
            return None
        likeliest = {
            self._text(top_id): logprob for top_id, logprob in zip(logprobs.top_ids, logprobs.top_logprobs, strict=True)
        }
        return likeliest | {self._text(token_id): logprobs.logprob}

    def _text(self, token_id: int) -> str:
        """Bytes that are no whole character are written out: as keys, tokens must differ."""
        literal = self._tokenizer.literal(token_id)
        try:
            return literal.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in literal)


def prompt_logprobs_payload(
    token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs], tokenizer: Tokenizer
) -> list[dict[str, Payload] | None]:
    """One entry for each token of the prompt: by token id, the token itself and the likeliest; null for the first."""
    entries: list[dict[str, Payload] | None] = [None]
    for token_id, each in zip(token_ids[1:], logprobs, strict=True):
        ranked = enumerate(zip(each.top_ids, each.top_logprobs, strict=True), start=1)
        told = {top_id: (logprob, rank) for rank, (top_id, logprob) in ranked}
        told[token_id] = (each.logprob, each.rank)
        entries.append(
            {
                str(told_id): {
                    "logprob": logprob,
                    "rank": rank,
                    "decoded_token": tokenizer.literal(told_id).decode(errors="replace"),
                }
                for told_id, (logprob, rank) in told.items()
            }
        )
    return entries
