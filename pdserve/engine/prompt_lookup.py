"""Drafts without a draft model: what followed the last tokens where they stood before.

Prompt lookup decoding (Saxena, 2023). Summaries, edits and quotations repeat their prompt; a step that checks a draft
costs little more than one that computes a single token, since decoding is bound by reading weights.
"""

from __future__ import annotations

from collections.abc import Sequence

NGRAM = 3  # tokens that must agree: fewer find too much that does not go on the same


class PromptLookup:
    """Follows one growing sequence: a look-up and an insertion a token."""

    def __init__(self, max_tokens: int) -> None:
        self._max_tokens = max_tokens
        self._length = max_tokens  # of the next draft
        self._followed = 0  # tokens whose n-grams are known, but for the last
        self._ends: dict[tuple[int, ...], int] = {}  # n-gram -> index behind its latest occurrence

    def draft(self, tokens: Sequence[int]) -> list[int]:
        """Up to `max_tokens` tokens that may come next; `tokens` are all so far."""
        # The n-gram at the very end is not entered yet: it would find itself.
        for end in range(max(NGRAM, self._followed), len(tokens)):
            self._ends[tuple(tokens[end - NGRAM : end])] = end
        self._followed = max(self._followed, len(tokens))
        begin = self._ends.get(tuple(tokens[-NGRAM:])) if len(tokens) >= NGRAM else None
        return [] if begin is None else list(tokens[begin : begin + self._length])

    def learn(self, drafted: int, accepted: int) -> None:
        """Drafts grow where they hold and shrink where they do not."""
        self._length = min(self._max_tokens, 2 * accepted + 1) if drafted else self._length
