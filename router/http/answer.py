"""The text side of one generation: tokens in, text for the client out."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pdserve.errors import WorkerFailed
from pdserve.request import FinishReason
from router.generation import Tokens
from router.http.call import Call
from router.text.detokenizer import Detokenizer
from router.text.stop import StopMatcher


class Answer:
    """
    Attributes:
        finish_reason: set with the last piece of text: STOP or LENGTH. A stop string ends the answer before its
            generation ends, so the caller then aborts that.
        output_tokens: up to the end of the answer, a stop token included.
        gaps_s: seconds between deliveries; at most one for each output token.
    """

    __slots__ = ("_call", "_clock", "_delivered_s", "_detokenizer", "_stop", "finish_reason", "gaps_s", "output_tokens")

    def __init__(self, call: Call, token_bytes: Sequence[bytes], clock: Callable[[], float]) -> None:
        self.finish_reason: FinishReason | None = None
        self.output_tokens = 0
        self.gaps_s: list[float] = []
        self._call = call
        self._detokenizer = Detokenizer(token_bytes)
        self._stop = StopMatcher(call.stop_strings) if call.stop_strings else None
        self._clock = clock
        self._delivered_s: float | None = None

    def push(self, tokens: Tokens) -> str:
        """Text that `tokens` complete; may be empty.

        Raises:
            WorkerFailed: the generation was aborted, and not through us.
        """
        if tokens.finish_reason in (FinishReason.ABORT, FinishReason.ERROR):
            raise WorkerFailed("The request was aborted by the server.")
        if tokens.token_ids:
            self._note_delivery()
        visible = self._visible(tokens)
        if self._stop is None:
            text = self._detokenizer.push(visible)
            self.output_tokens += len(visible)
        else:
            text = self._push_matching(self._stop, visible)
            if self._stop.matched:
                self.finish_reason = FinishReason.STOP
                return text
        self.output_tokens += len(tokens.token_ids) - len(visible)
        return text if tokens.finish_reason is None else text + self._finish(tokens.finish_reason)

    def _note_delivery(self) -> None:
        now_s = self._clock()
        if self._delivered_s is not None:
            self.gaps_s.append(now_s - self._delivered_s)
        self._delivered_s = now_s

    def _visible(self, tokens: Tokens) -> tuple[int, ...]:
        """A stop token ends the answer and is no part of its text."""
        ids = tokens.token_ids
        stopped = tokens.finish_reason is FinishReason.STOP and ids and ids[-1] in self._call.sampling.stop_token_ids
        return ids[:-1] if stopped else ids

    def _push_matching(self, stop: StopMatcher, token_ids: tuple[int, ...]) -> str:
        """Token by token, so that the count of tokens ends at the one that completes a stop string."""
        pieces: list[str] = []
        for token_id in token_ids:
            self.output_tokens += 1
            text = self._detokenizer.push((token_id,))
            may_stop = self.output_tokens > self._call.sampling.min_tokens
            pieces.append(stop.push(text) if may_stop else text)
            if stop.matched:
                break
        return "".join(pieces)

    def _finish(self, finish_reason: FinishReason) -> str:
        self.finish_reason = finish_reason
        rest = self._detokenizer.flush()
        if self._stop is None:
            return rest
        rest = self._stop.push(rest) + self._stop.flush()
        if self._stop.matched:
            self.finish_reason = FinishReason.STOP
        return rest
