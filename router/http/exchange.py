"""One HTTP request and its response on bare ASGI: bounded reading, bounded writing, and noticing a client that left.

Within `async with exchange` one timer watches over the limits of all that is done. It looks when the first of them
could be passed, so that what is done in time costs no timer of its own.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Self

import msgspec
from starlette.types import Message, Receive, Scope, Send

from pdserve.errors import DeadlineExceeded, PayloadTooLarge, ServeError
from router.caller import Caller
from router.http.access import CALLER_KEY
from router.http.errors import ClientGone, ReceiptTimeout, error_headers, error_payload, stream_error_payload
from router.http.service import HttpLimits

REQUEST_ID_KEY = "pdserve.request_id"  # in the ASGI scope

# Until the first look at a request: whoever leaves is noticed after it, and most requests are through before.
_LOOK_S = 0.05

encode_json = msgspec.json.encode
_JSON_HEADERS = [(b"content-type", b"application/json")]
_SSE_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would collect the events
]


def sse_event(payload: Mapping[str, Any]) -> bytes:
    return b"data: " + encode_json(payload) + b"\n\n"


class Exchange:
    """
    `body` and then either one `respond`, or `write`s of which the last has `last=True`, all within its block; behind it
    `fail` ends both kinds, and may also be all that there is.

    The block raises ReceiptTimeout for a request that came too slowly, DeadlineExceeded if it takes longer than
    `limits.request_s` and `grace_s` together, and ClientGone for a write that waited too long.

    Attributes:
        extra_headers: for the start of the response, set before it.
        caller: who sent it.
        gone: the client has closed the connection or does not read.
    """

    __slots__ = (
        "_bound",
        "_clock",
        "_grace_s",
        "_limits",
        "_on_gone",
        "_passed",
        "_receive",
        "_received",
        "_send",
        "_start_s",
        "_streaming",
        "_timer",
        "_watcher",
        "_writing_s",
        "caller",
        "extra_headers",
        "gone",
        "headers",
        "path_params",
        "request_id",
    )

    def __init__(self, scope: Scope, receive: Receive, send: Send, limits: HttpLimits, grace_s: float = 0.0) -> None:
        self.headers: dict[bytes, bytes] = dict(scope["headers"])
        self.caller: Caller = scope[CALLER_KEY]
        self.request_id: str = scope[REQUEST_ID_KEY]
        self.path_params: Mapping[str, str] = scope.get("path_params", {})
        self.extra_headers: list[tuple[bytes, bytes]] = []
        self.gone = False
        self._receive = receive
        self._send = send
        self._limits = limits
        self._grace_s = grace_s
        self._received = False
        self._streaming = False
        self._writing_s: float | None = None  # when the write that is under way began, on the loop's clock
        self._passed: Exception | None = None  # what the limit that was passed means
        self._on_gone: Callable[[], None] | None = None
        self._watcher: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()
        self._clock = loop.time
        self._start_s = loop.time()
        self._bound = asyncio.timeout(None)
        await self._bound.__aenter__()
        self._timer = loop.call_at(self._start_s + min(self._limits.receipt_s, _LOOK_S), self._look)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._timer.cancel()
        self._on_gone = None
        if self._watcher is not None:
            self._watcher.cancel()
        try:
            await self._bound.__aexit__(kind, error, trace)
        except TimeoutError as over:
            assert self._passed is not None
            raise self._passed from over

    def _look(self) -> None:
        """Cancels what is done if it takes too long; else looks again when it could."""
        loop, limits = asyncio.get_running_loop(), self._limits
        now_s = loop.time()
        if self._on_gone is not None and self._watcher is None:
            self._watcher = asyncio.create_task(self._disconnected())
        stalled_s = (now_s if self._writing_s is None else self._writing_s) + limits.write_stall_s
        until_s = self._start_s + (limits.request_s + self._grace_s if self._received else limits.receipt_s)
        if now_s < min(stalled_s, until_s):
            soon_s = now_s + _LOOK_S if self._watcher is None else stalled_s
            self._timer = loop.call_at(min(soon_s, stalled_s, until_s), self._look)
            return
        if now_s < until_s:
            self.gone, self._passed = True, ClientGone()
        elif self._received:
            self._passed = DeadlineExceeded("The request took too long.")
        else:
            self._passed = ReceiptTimeout(f"The request did not arrive within {limits.receipt_s:g} seconds.")
        self._bound.reschedule(now_s)

    def when_gone(self, call: Callable[[], None]) -> None:
        """Calls it once the client has gone, while the block lasts. Only after `body`.

        The server is asked a moment later, by a task: most requests are through before that.
        """
        self._on_gone = call

    async def body(self) -> bytes:
        """
        Raises:
            PayloadTooLarge: before more than the limit is held.
            ClientGone
        """
        limit = self._limits.body_bytes
        declared = self.headers.get(b"content-length", b"")
        if declared.isdigit() and int(declared) > limit:
            raise _too_large(limit)
        body = await self._read(limit)
        self._received = True
        return body

    async def respond(self, status: int, payload: Mapping[str, Any], headers: Mapping[str, str] | None = None) -> None:
        """A whole JSON response. Raises ClientGone."""
        await self._emit(*self._whole(status, payload, headers))

    async def write(self, data: bytes, *, last: bool = False) -> None:
        """Events of a stream; the first call sends the headers. Raises ClientGone.

        The server below buffers a bounded amount and then waits, which is how a slow client slows its request.
        """
        events: Message = {"type": "http.response.body", "body": data, "more_body": not last}
        if self._streaming:
            self._writing_s = self._clock()
            try:
                await self._send(events)
            except OSError as error:
                self.gone = True
                raise ClientGone from error
            self._writing_s = None
            return
        self._streaming = True
        headers = [*_SSE_HEADERS, *self.extra_headers]
        await self._emit({"type": "http.response.start", "status": 200, "headers": headers}, events)

    async def fail(self, error: ServeError) -> None:
        """The error as a response, or as the last event of a stream that has begun; then without [DONE]."""
        messages: tuple[Message, ...]
        if self._streaming:
            data = sse_event(stream_error_payload(error, self.request_id))
            messages = ({"type": "http.response.body", "body": data, "more_body": False},)
        else:
            messages = self._whole(error.status, error_payload(error), error_headers(error))
        try:
            async with asyncio.timeout(self._limits.write_stall_s):
                await self._emit(*messages)
        except TimeoutError as over:
            self.gone = True
            raise ClientGone from over

    async def _disconnected(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self.gone = True
        if self._on_gone is not None:
            self._on_gone()

    async def _read(self, limit: int) -> bytes:
        chunks: list[bytes] = []
        size = 0
        while True:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                self.gone = True
                raise ClientGone
            chunk = message.get("body", b"")
            size += len(chunk)
            if size > limit:
                raise _too_large(limit)
            chunks.append(chunk)
            if not message.get("more_body", False):
                return b"".join(chunks)

    def _whole(
        self, status: int, payload: Mapping[str, Any], headers: Mapping[str, str] | None
    ) -> tuple[Message, Message]:
        body = encode_json(payload)
        extra = [(name.encode(), value.encode()) for name, value in (headers or {}).items()]
        length = (b"content-length", str(len(body)).encode())
        all_headers = [*_JSON_HEADERS, length, *extra, *self.extra_headers]
        start: Message = {"type": "http.response.start", "status": status, "headers": all_headers}
        return start, {"type": "http.response.body", "body": body}

    async def _emit(self, *messages: Message) -> None:
        self._writing_s = asyncio.get_running_loop().time()
        try:
            for message in messages:
                await self._send(message)
        except OSError as error:
            self.gone = True
            raise ClientGone from error
        finally:
            self._writing_s = None


def _too_large(limit: int) -> PayloadTooLarge:
    return PayloadTooLarge(f"The request body is larger than {limit} bytes.")
