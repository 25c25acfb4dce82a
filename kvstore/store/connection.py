"""The worker's end of the node's Unix socket: calls that are answered out of turn, each by its deadline.

A connection ends as a whole: a call that is late, a refusal, a frame that is none, or the node hanging up give every
open call None. A node that is frozen therefore costs one bounded wait, and what it answers later is read by nobody.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, cast

from kvstore.store.frames import BadFrame, FrameReader, Kind, encode_frame

LATE = "it is late"  # why it ended, of a node that may go on
_MAX_UNREAD_BYTES = 64 << 10


class _Call(NamedTuple):
    answer: asyncio.Future[bytes | None]
    timer: asyncio.TimerHandle
    unseen: Callable[[bytes], None] | None


class Connection(asyncio.Protocol):
    """Use on the asyncio loop only."""

    def __init__(self) -> None:
        self.ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()  # with the reason
        self.refusal = ""  # what the node said before it hung up
        self._reader = FrameReader()
        self._transport: asyncio.Transport | None = None
        self._calls: dict[int, _Call] = {}
        self._last_call = 0

    @classmethod
    async def open(cls, path: Path) -> Connection:
        """Raises OSError if nobody listens there."""
        _, connection = await asyncio.get_running_loop().create_unix_connection(cls, str(path))
        return connection

    async def call(
        self, kind: Kind, payload: bytes, timeout_s: float, unseen: Callable[[bytes], None] | None = None
    ) -> bytes | None:
        """The payload of the reply, or None if there is none.

        Args:
            unseen: is given the reply if the caller is cancelled before it has it: what was granted must be given
                back. It may raise BadFrame.
        """
        if self._transport is None or self.ended.done():
            return None
        loop = asyncio.get_running_loop()
        number = self._last_call = self._last_call % 0xFFFFFFFF + 1
        answer: asyncio.Future[bytes | None] = loop.create_future()
        timer = loop.call_later(timeout_s, self.close, LATE)
        self._calls[number] = _Call(answer, timer, unseen)
        self._transport.write(encode_frame(kind, number, payload))
        try:
            return await answer
        except asyncio.CancelledError:
            if unseen is not None and not answer.cancelled() and (reply := answer.result()) is not None:
                self._give_back(unseen, reply)  # it came in the turn of the loop in which the caller was cancelled
            raise

    def tell(self, kind: Kind, payload: bytes) -> None:
        """A message without a reply; how many there are is bounded by who looks at `keeps_up`."""
        if self._transport is not None and not self.ended.done():
            self._transport.write(encode_frame(kind, 0, payload))

    @property
    def keeps_up(self) -> bool:
        """Whether the node reads what it is told. One that does not is to be asked, which takes its time, or ends."""
        return self._transport is not None and self._transport.get_write_buffer_size() <= _MAX_UNREAD_BYTES

    def close(self, reason: str) -> None:
        """Idempotent."""
        if self.ended.done():
            return
        self.ended.set_result(self.refusal or reason)
        if self._transport is not None:
            self._transport.abort()
        calls, self._calls = self._calls, {}
        for call in calls.values():
            call.timer.cancel()
            if not call.answer.done():
                call.answer.set_result(None)

    # --- called by the loop ------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's does not derive from it

    def data_received(self, data: bytes) -> None:
        try:
            for kind, number, payload in self._reader.feed(data):
                self._take(kind, number, payload)
        except BadFrame as error:
            self.close(str(error))

    def connection_lost(self, error: Exception | None) -> None:
        self.close(str(error) if error is not None else "it hung up")

    def _take(self, kind: int, number: int, payload: bytes) -> None:
        """Raises BadFrame."""
        if self.ended.done():
            return
        if kind == Kind.REFUSAL:
            self.refusal = payload.decode(errors="replace")
            self.close(self.refusal)
            return
        call = self._calls.pop(number, None)
        if kind != Kind.REPLY or call is None:
            raise BadFrame("the store node answers what it was not asked")
        call.timer.cancel()
        if not call.answer.cancelled():
            call.answer.set_result(payload)
        elif call.unseen is not None:
            self._give_back(call.unseen, payload)

    def _give_back(self, unseen: Callable[[bytes], None], reply: bytes) -> None:
        try:
            unseen(reply)
        except BadFrame as error:
            self.close(str(error))
