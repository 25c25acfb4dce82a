"""The text side of one generation: tokens in, pieces for the client out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pdserve.errors import WorkerFailed
from pdserve.request import FinishReason, TokenLogprobs
from router.generation import Tokens
from router.http.call import Call
from router.text.detokenizer import Detokenizer
from router.text.stop import StopMatcher
from router.text.tokenizer import Tokenizer
from router.text.tool_calls import ToolCallParser, ToolCallText


@dataclass(slots=True)  # one a token: freezing it would cost as much as making it
class Piece:
    """What some tokens add to an answer.

    `token_ids` are all of them up to the answer's end, a stop token included; `visible` leaves that out, and
    `logprobs` are of the visible ones.
    """

    text: str
    token_ids: tuple[int, ...] = ()
    visible: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    tool_calls: tuple[ToolCallText, ...] = ()


class Answer:
    """
    Attributes:
        finish_reason: set with the last piece: STOP or LENGTH. A stop string ends the answer before its generation
            ends, so the caller then finishes that.
        output_tokens: up to the end of the answer, a stop token included.
        prompt_logprobs: known with the first piece, if asked for.
        total_logprob: of the visible tokens, as far as log probabilities were asked for.
        gaps_s: seconds between deliveries; at most one for each output token.
    """

    __slots__ = (
        *("_call", "_clock", "_delivered_s", "_detokenizer", "_plain", "_stop", "_tools", "finish_reason", "gaps_s"),
        *("output_tokens", "prompt_logprobs", "total_logprob"),
    )

    def __init__(self, call: Call, tokenizer: Tokenizer, clock: Callable[[], float]) -> None:
        self.finish_reason: FinishReason | None = None
        self.output_tokens = 0
        self.gaps_s: list[float] = []
        self.prompt_logprobs: tuple[TokenLogprobs, ...] = ()
        self.total_logprob = 0.0
        self._call = call
        self._detokenizer = Detokenizer(_token_bytes(call, tokenizer))
        self._stop = StopMatcher(call.stop_strings, keep=call.keeps_stop_string) if call.stop_strings else None
        self._tools = ToolCallParser(call.tooling.format) if call.tooling is not None else None
        # Text alone becomes of tokens, but for the last ones.
        self._plain = not call.stop_strings and call.tooling is None and not call.echo_only
        self._clock = clock
        self._delivered_s: float | None = None

    def push(self, tokens: Tokens) -> Piece:
        """What `tokens` complete; the text may be empty.

        Raises:
            WorkerFailed: the generation was aborted, and not through us.
        """
        if self._plain and tokens.finish_reason is None and not (tokens.logprobs or tokens.prompt_logprobs):
            self._note_delivery()
            ids = tokens.token_ids
            self.output_tokens += len(ids)
            return Piece(self._detokenizer.push(ids), ids, ids)
        if tokens.finish_reason in (FinishReason.ABORT, FinishReason.ERROR):
            raise WorkerFailed("The request was aborted by the server.")
        if tokens.token_ids:
            self._note_delivery()
        if tokens.prompt_logprobs:
            self.prompt_logprobs = tokens.prompt_logprobs
        if self._call.echo_only:
            self.finish_reason = FinishReason.LENGTH
            return Piece("")
        piece = self._read(tokens)
        self.output_tokens += len(piece.token_ids)
        if piece.logprobs:
            self.total_logprob += sum(each.logprob for each in piece.logprobs)
        return piece if self._tools is None else self._split(piece, self._tools)

    def _note_delivery(self) -> None:
        now_s = self._clock()
        if self._delivered_s is not None:
            self.gaps_s.append(now_s - self._delivered_s)
        self._delivered_s = now_s

    def _read(self, tokens: Tokens) -> Piece:
        """A stop token ends the answer and is no part of its text; nothing behind a stop string is."""
        ids = tokens.token_ids
        stopped = tokens.finish_reason is FinishReason.STOP and ids and ids[-1] in self._call.sampling.stop_token_ids
        visible = ids[:-1] if stopped else ids
        if self._stop is None:
            text = self._detokenizer.push(visible)
        else:
            text, count = self._push_matching(self._stop, visible)
            if self._stop.matched:
                self.finish_reason = FinishReason.STOP
                return Piece(text, ids[:count], ids[:count], tokens.logprobs[:count])
        if tokens.finish_reason is not None:
            text += self._finish(tokens.finish_reason)
        return Piece(text, ids, visible, tokens.logprobs[: len(visible)])

    def _push_matching(self, stop: StopMatcher, token_ids: Sequence[int]) -> tuple[str, int]:
        """Token by token; with the text, the number of tokens up to the one that completes a stop string."""
        pieces: list[str] = []
        count = 0
        for token_id in token_ids:
            count += 1
            text = self._detokenizer.push((token_id,))
            may_stop = self.output_tokens + count > self._call.sampling.min_tokens
            pieces.append(stop.push(text) if may_stop else text)
            if stop.matched:
                break
        return "".join(pieces), count

    def _finish(self, finish_reason: FinishReason) -> str:
        self.finish_reason = finish_reason
        rest = self._detokenizer.flush()
        if self._stop is None:
            return rest
        rest = self._stop.push(rest) + self._stop.flush()
        if self._stop.matched:
            self.finish_reason = FinishReason.STOP
        return rest

    def _split(self, piece: Piece, tools: ToolCallParser) -> Piece:
        """Calls leave the text."""
        text, calls = tools.push(piece.text)
        if self.finish_reason is not None:
            rest, last = tools.flush()
            text, calls = text + rest, calls + last
        return Piece(text, piece.token_ids, piece.visible, piece.logprobs, tuple(calls))


def _token_bytes(call: Call, tokenizer: Tokenizer) -> Sequence[bytes]:
    """Special tokens that mark a call are read, whether or not the client sees others."""
    if call.writes_special:
        return tokenizer.literals
    if call.tooling is not None:
        tool_format = call.tooling.format
        return tokenizer.token_bytes_with(frozenset((tool_format.begin, tool_format.end, tool_format.mark)))
    return tokenizer.token_bytes
