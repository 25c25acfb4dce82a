"""One streamed request as bytes: what to send, and what the received bytes mean. No socket, no clock.

feed(bytes, now) ──> status line, headers ──> body ──> `data:` lines ──> chunks ──> Outcome
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import httptools
import msgspec

from loadtest.outcome import Outcome, ServerTimes
from loadtest.target import Target

# A line longer than this is no event of a stream.
MAX_LINE_BYTES = 1 << 20
# Of an answer that is no stream, as much as a report would show.
_ERROR_CHARS = 300


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None

    @property
    def piece(self) -> str:
        if self.delta is not None:
            return (self.delta.reasoning_content or "") + (self.delta.content or "")
        return self.text or ""


class _PromptDetails(msgspec.Struct):
    cached_tokens: int | None = 0


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: _PromptDetails | None = None


class _Extension(msgspec.Struct):
    stages: dict[str, float] = {}
    handoff: dict[str, float] = {}


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    x_pdserve: _Extension | None = None
    error: Any = None


_decode = msgspec.json.Decoder(_Chunk).decode


def request_bytes(target: Target, path: str, body: dict[str, Any]) -> bytes:
    """A whole HTTP/1.1 request for one stream on a connection of its own; `path` as in `/chat/completions`."""
    content = msgspec.json.encode(
        {"model": target.model, **body, "stream": True, "stream_options": {"include_usage": True}}
    )
    lines = [
        f"POST {target.prefix}{path} HTTP/1.1",
        f"Host: {target.host}:{target.port}",
        "Content-Type: application/json",
        f"Content-Length: {len(content)}",
        "Connection: close",
        *(f"{name}: {value}" for name, value in target.headers.items()),
    ]
    return "\r\n".join([*lines, "", ""]).encode() + content


class Exchange:
    """Reads the answer to one request that was sent at `began_s`. Times are seconds of one monotonic clock.

    Attributes:
        finished: nothing more is expected.
    """

    def __init__(self, began_s: float) -> None:
        self.finished = False
        self._began_s = began_s
        self._parser = httptools.HttpResponseParser(self)
        self._status = 0
        self._error = ""
        self._rest = b""
        self._now_s = began_s
        self._arrivals_s: list[float] = []
        self._pieces: list[str] = []
        self._usage: _Usage | None = None
        self._server: ServerTimes | None = None

    def feed(self, data: bytes, now_s: float) -> None:
        """`data` was received at `now_s`; empty is the end of the connection. Nothing a peer sends raises."""
        self._now_s = now_s
        if not data:
            self.fail("the connection ended before the stream did")
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self.fail(f"no HTTP: {error}")

    def fail(self, error: str) -> None:
        """The first reason stays; none is taken after the end."""
        if not self.finished:
            self._error = error
            self.finished = True

    def outcome(self, late_s: float = 0.0) -> Outcome:
        """What was seen until now."""
        arrivals_s, usage = self._arrivals_s, self._usage or _Usage()
        # A server that reports no usage sends a token a chunk, as most do.
        tokens = usage.completion_tokens or len(arrivals_s)
        took_s = arrivals_s[-1] - arrivals_s[0] if arrivals_s else 0.0
        details = usage.prompt_tokens_details
        return Outcome(
            status=self._status,
            error=self._error,
            ttft_s=arrivals_s[0] - self._began_s if arrivals_s else None,
            tpot_s=took_s / (tokens - 1) if len(arrivals_s) > 1 and tokens > 1 else None,
            gaps_s=tuple(later - earlier for earlier, later in pairwise(arrivals_s)),
            e2e_s=(arrivals_s[-1] if arrivals_s and not self._error else self._now_s) - self._began_s,
            prompt_tokens=usage.prompt_tokens,
            cached_tokens=(details.cached_tokens or 0) if details else 0,
            output_tokens=tokens,
            text="".join(self._pieces),
            server=self._server,
            late_s=late_s,
        )

    # --- called by the parser ---------------------------------------------------------------------------------------

    def on_headers_complete(self) -> None:
        self._status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        *lines, self._rest = (self._rest + body).split(b"\n")
        if self._status != 200:
            self._rest = b"\n".join([*lines, self._rest])[:_ERROR_CHARS]
            return
        for line in lines:
            if line.startswith(b"data:") and not self.finished:
                self._event(line[5:].strip())
        if len(self._rest) > MAX_LINE_BYTES:
            self.fail("a line of the stream is too long")

    def on_message_complete(self) -> None:
        if self._status != 200:
            self.fail(f"HTTP {self._status}: {self._rest.decode(errors='replace')}")
        self.fail("the response ended before the stream did")

    def _event(self, data: bytes) -> None:
        if data == b"[DONE]":
            self.finished = True
            return
        try:
            chunk = _decode(data)
        except msgspec.DecodeError as error:
            self.fail(f"no chunk of a stream: {error}")
            return
        if chunk.error is not None:
            self.fail(f"error in the stream: {chunk.error}"[:_ERROR_CHARS])
            return
        piece = "".join(choice.piece for choice in chunk.choices)
        if piece:
            self._arrivals_s.append(self._now_s)
            self._pieces.append(piece)
        if chunk.usage is not None:
            self._usage = chunk.usage
        if chunk.x_pdserve is not None:
            self._server = ServerTimes(chunk.x_pdserve.stages, chunk.x_pdserve.handoff)
