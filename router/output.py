"""The output of one request: tokens accepted once and in order, buffered for one reader, ended once (invariant I3)."""

from __future__ import annotations

import asyncio

from pdserve.errors import ServeError
from pdserve.protocol import worker_pb2 as pb
from pdserve.protocol.codec import logprobs_from_proto
from pdserve.request import FinishReason, TokenLogprobs
from router.generation import Tokens


class TokenOrder:
    """Accepts the output token whose index is next. Decode's first may overtake prefill's, so later ones are held."""

    def __init__(self, max_tokens: int, max_held: int) -> None:
        self.token_ids: list[int] = []
        self._max_tokens = max_tokens
        self._max_held = max_held
        self._held: dict[int, pb.TokenEvent] = {}

    @property
    def gap(self) -> bool:
        """Later tokens are held because one before them is missing."""
        return bool(self._held)

    def restart(self) -> None:
        """A new attempt: what is held of the old one will not be completed."""
        self._held.clear()

    def offer(self, event: pb.TokenEvent) -> list[pb.TokenEvent] | None:
        """Events that are now in order, oldest first; None when this one is a duplicate, out of bounds or too early."""
        next_index = len(self.token_ids)
        if event.index == next_index and not self._held:
            if next_index >= self._max_tokens:
                return None
            self._append(event)
            return [event]
        if event.index < next_index or event.index >= self._max_tokens or event.index in self._held:
            return None
        if len(self._held) >= self._max_held:
            return None
        self._held[event.index] = event
        ready: list[pb.TokenEvent] = []
        while (held := self._held.pop(len(self.token_ids), None)) is not None:
            self._append(held)
            ready.append(held)
            if held.no_token:
                break
        return ready

    def next(self, event: pb.TokenEvent) -> bool:
        """Takes a token that is the next one and before which none is missing."""
        token_ids = self.token_ids
        if self._held or event.index != len(token_ids) or event.index >= self._max_tokens:
            return False
        token_ids.append(event.token_id)
        return True

    def _append(self, event: pb.TokenEvent) -> None:
        if not event.no_token:
            self.token_ids.append(event.token_id)


class OutputBuffer:
    """Between the worker's messages and one reader. Bounded by the request's max_tokens."""

    def __init__(self) -> None:
        self._fresh: list[int] = []
        self._logprobs: list[TokenLogprobs] = []  # of the fresh tokens, if asked for
        self._prompt_logprobs: tuple[TokenLogprobs, ...] = ()
        self._finish: FinishReason | None = None
        self._error: ServeError | None = None
        self._told = False  # the reader has had the end
        self._reader: asyncio.Future[None] | None = None  # while it waits

    @property
    def closed(self) -> bool:
        return self._finish is not None or self._error is not None

    def put(self, event: pb.TokenEvent) -> None:
        self._fresh.append(event.token_id)
        if event.HasField("logprobs"):
            self._logprobs.append(logprobs_from_proto(event.logprobs))
        if event.prompt_logprobs:
            self._prompt_logprobs = tuple(map(logprobs_from_proto, event.prompt_logprobs))
        self._wake()

    def close(self, end: FinishReason | ServeError) -> None:
        """The first end counts."""
        if self.closed:
            return
        if isinstance(end, ServeError):
            self._error = end
        else:
            self._finish = end
        self._wake()

    async def next(self) -> Tokens:
        """Raises the error that ended the output, after its tokens, and StopAsyncIteration after the end."""
        while not (self._fresh or self.closed):
            self._reader = asyncio.get_running_loop().create_future()
            await self._reader
        if self._told:
            raise StopAsyncIteration
        if self._fresh:
            tokens = Tokens(tuple(self._fresh), self._finish, tuple(self._logprobs), self._prompt_logprobs)
            self._fresh.clear()
            self._logprobs.clear()
            self._prompt_logprobs = ()
            self._told = self._finish is not None
            return tokens
        self._told = True
        if self._error is not None:
            raise self._error
        return Tokens((), self._finish)

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)
