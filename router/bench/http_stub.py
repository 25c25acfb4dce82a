"""An HTTP server that answers completions at once, for routers that are proxies: `python -m router.bench.http_stub`.

As fast as Python gets: no framework, one prepared chunk written once a token. Prints its address.
"""

from __future__ import annotations

import asyncio
import json
import re
from typing import cast

import uvloop

_LENGTH = re.compile(rb"content-length: *(\d+)", re.IGNORECASE)
_MAX_TOKENS = re.compile(rb'"max_tokens": *(\d+)')
_HEAD = b"HTTP/1.1 200 OK\r\nserver: stub\r\ncontent-type: "
_CHUNK = {
    "id": "cmpl-0",
    "object": "text_completion",
    "created": 0,
    "model": "stub",
    "choices": [{"text": " word", "index": 0, "logprobs": None, "finish_reason": None}],
}


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


_EVENT = _chunk(b"data: " + json.dumps(_CHUNK).encode() + b"\n\n")
_STREAM_HEAD = _HEAD + b"text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
_STREAM_END = _chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"
_BODY = json.dumps({**_CHUNK, "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}}).encode()
_WHOLE = _HEAD + b"application/json\r\ncontent-length: %d\r\n\r\n" % len(_BODY) + _BODY


class StubServer(asyncio.Protocol):
    """One connection; requests one after the other."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one in all but name
        self._received = b""

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, blank, rest = self._received.partition(b"\r\n\r\n")
        if not blank:
            return
        length = _LENGTH.search(head)
        if length is not None and len(rest) < int(length[1]):
            return
        self._received = b""
        if b'"stream": true' in rest or b'"stream":true' in rest:
            tokens = _MAX_TOKENS.search(rest.replace(b'":', b'": '))
            self._transport.write(_STREAM_HEAD)
            self._stream(int(tokens[1]) if tokens is not None else 1)
        else:
            self._transport.write(_WHOLE)

    def _stream(self, left: int) -> None:
        if self._transport.is_closing():
            return
        self._transport.write(_EVENT)
        if left > 1:
            asyncio.get_running_loop().call_soon(self._stream, left - 1)
        else:
            self._transport.write(_STREAM_END)


async def _serve() -> None:
    server = await asyncio.get_running_loop().create_server(StubServer, "127.0.0.1", 0)
    print(f"127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve())
