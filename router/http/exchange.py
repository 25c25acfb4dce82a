"""One HTTP request and its response on bare ASGI: bounded reading, bounded writing, and noticing a client that left."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from typing import Any

import msgspec
from starlette.types import Message, Receive, Scope, Send

from pdserve.errors import PayloadTooLarge, ServeError
from router.caller import Caller
from router.http.access import CALLER_KEY
from router.http.errors import ClientGone, ReceiptTimeout, error_headers, error_payload, stream_error_payload
from router.http.service import HttpLimits

REQUEST_ID_KEY = "pdserve.request_id"  # in the ASGI scope

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
    Either one `respond`, or `write`s within `streaming` of which the last has `last=True`; `fail` ends both kinds.

    Attributes:
        extra_headers: for the start of the response, set before it.
        caller: who sent it.
        gone: the client has closed the connection or does not read.
    """

    __slots__ = (
        "_limits",
        "_receive",
        "_send",
        "_streaming",
        "_writing_s",
        "caller",
        "extra_headers",
        "gone",
        "headers",
        "path_params",
        "request_id",
    )

    def __init__(self, scope: Scope, receive: Receive, send: Send, limits: HttpLimits) -> None:
        self.headers: dict[bytes, bytes] = dict(scope["headers"])
        self.caller: Caller = scope[CALLER_KEY]
        self.request_id: str = scope[REQUEST_ID_KEY]
        self.path_params: Mapping[str, str] = scope.get("path_params", {})
        self.extra_headers: list[tuple[bytes, bytes]] = []
        self.gone = False
        self._receive = receive
        self._send = send
        self._limits = limits
        self._streaming = False
        self._writing_s: float | None = None  # when the write that is under way began, on the loop's clock

    async def body(self) -> bytes:
        """
        Raises:
            PayloadTooLarge: before more than the limit is held.
            ReceiptTimeout: it did not arrive in time.
            ClientGone
        """
        limit = self._limits.body_bytes
        declared = self.headers.get(b"content-length", b"")
        if declared.isdigit() and int(declared) > limit:
            raise _too_large(limit)
        try:
            async with asyncio.timeout(self._limits.receipt_s):
                return await self._read(limit)
        except TimeoutError as error:
            raise ReceiptTimeout(f"The request did not arrive within {self._limits.receipt_s:g} seconds.") from error

    async def respond(self, status: int, payload: Mapping[str, Any], headers: Mapping[str, str] | None = None) -> None:
        """A whole JSON response. Raises ClientGone."""
        body = encode_json(payload)
        extra = [(name.encode(), value.encode()) for name, value in (headers or {}).items()]
        length = (b"content-length", str(len(body)).encode())
        await self._emit(
            {
                "type": "http.response.start",
                "status": status,
                "headers": [*_JSON_HEADERS, length, *extra, *self.extra_headers],
            }
        )
        await self._emit({"type": "http.response.body", "body": body})

    @contextlib.asynccontextmanager
    async def streaming(self) -> AsyncIterator[None]:
        """Where `write` may be called. Raises ClientGone when one waits too long: one timer watches all of them."""
        loop, limit_s = asyncio.get_running_loop(), self._limits.write_stall_s

        timer: asyncio.TimerHandle

        def look() -> None:
            nonlocal timer
            now_s = loop.time()
            began_s = self._writing_s if self._writing_s is not None else now_s
            if now_s < began_s + limit_s:
                timer = loop.call_at(began_s + limit_s, look)
            else:
                self.gone = True
                stalled.reschedule(now_s)

        timer = loop.call_later(limit_s, look)
        try:
            async with asyncio.timeout(None) as stalled:
                yield
        except TimeoutError as error:
            raise ClientGone from error
        finally:
            timer.cancel()

    async def write(self, data: bytes, *, last: bool = False) -> None:
        """Events of a stream; the first call sends the headers. Raises ClientGone.

        The server below buffers a bounded amount and then waits, which is how a slow client slows its request.
        """
        self._writing_s = asyncio.get_running_loop().time()
        try:
            if not self._streaming:
                self._streaming = True
                headers = [*_SSE_HEADERS, *self.extra_headers]
                await self._send({"type": "http.response.start", "status": 200, "headers": headers})
            await self._send({"type": "http.response.body", "body": data, "more_body": not last})
        except OSError as error:
            self.gone = True
            raise ClientGone from error
        finally:
            self._writing_s = None

    async def fail(self, error: ServeError) -> None:
        """The error as a response, or as the last event of a stream that has begun; then without [DONE]."""
        if self._streaming:
            data = sse_event(stream_error_payload(error, self.request_id))
            await self._emit({"type": "http.response.body", "body": data, "more_body": False})
        else:
            await self.respond(error.status, error_payload(error), error_headers(error))

    async def disconnected(self) -> None:
        """Returns when the client has gone. Only after `body`."""
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self.gone = True

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

    async def _emit(self, message: Message) -> None:
        """A message on its own, with a deadline of its own."""
        try:
            async with asyncio.timeout(self._limits.write_stall_s):
                await self._send(message)
        except OSError as error:  # closed connection, or TimeoutError
            self.gone = True
            raise ClientGone from error


def _too_large(limit: int) -> PayloadTooLarge:
    return PayloadTooLarge(f"The request body is larger than {limit} bytes.")
