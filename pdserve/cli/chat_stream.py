"""One streamed answer of a chat completion: pieces of text, and how fast they came."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any

from pdserve.launch.http_front import connect, credentials

# Longer than the server's own limits on a first token and on a stall, so that its error arrives.
TIMEOUT_S = 60.0
MAX_LINE_BYTES = 1 << 20


class ChatFailed(Exception):
    """The server refused or broke off; one sentence."""


@dataclass(slots=True)
class AnswerStats:
    """Filled while the answer streams; seconds on the monotonic clock."""

    started_s: float
    first_s: float | None = None
    last_s: float | None = None
    output_tokens: int | None = None  # as the server counts them; None before the end
    cached_tokens: int = 0
    prompt_tokens: int = 0

    def describe(self) -> str:
        if self.first_s is None or self.last_s is None:
            return "no token"
        parts = [f"first token after {self.first_s - self.started_s:.2f} s"]
        decoding_s = self.last_s - self.first_s
        if self.output_tokens is not None:
            parts.append(f"{self.output_tokens} tokens")
            if self.output_tokens > 1 and decoding_s > 0:
                parts.append(f"{(self.output_tokens - 1) / decoding_s:.1f} tokens/s")
            parts.append(f"{self.cached_tokens} of {self.prompt_tokens} prompt tokens cached")
        return " · ".join(parts)


def stream_answer(url: str, body: dict[str, Any], stats: AnswerStats) -> Generator[str, None, None]:
    """Pieces of text as they come. Closing the iterator ends the request on the server.

    Raises:
        ChatFailed: the server is not there, refused the request, or broke off.
    """
    connection = connect(url, TIMEOUT_S)
    payload = json.dumps({**body, "stream": True, "stream_options": {"include_usage": True}})
    try:
        connection.request(
            "POST", "/v1/chat/completions", payload, {"Content-Type": "application/json", **credentials()}
        )
        response = connection.getresponse()
        if response.status != 200:
            raise ChatFailed(_refusal(response.status, response.read(MAX_LINE_BYTES)))
        for event in sse_events(response):
            yield from _pieces(event, stats)
    except (OSError, http.client.HTTPException) as error:
        raise ChatFailed(f"The connection to {url} failed: {error or type(error).__name__}.") from error
    finally:
        connection.close()


def sse_events(response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    """The JSON of each `data:` line up to `[DONE]`. Raises ChatFailed if the stream ends without it."""
    while line := response.readline(MAX_LINE_BYTES):
        if not line.startswith(b"data:"):
            continue
        data = line[len(b"data:") :].strip()
        if data == b"[DONE]":
            return
        try:
            yield json.loads(data)
        except ValueError as error:
            raise ChatFailed("The server sent an event that is no JSON.") from error
    raise ChatFailed("The server broke off.")


def _pieces(event: dict[str, Any], stats: AnswerStats) -> Iterator[str]:
    if "error" in event:
        raise ChatFailed(str(event["error"].get("message", event["error"])))
    usage = event.get("usage")
    if usage:
        stats.output_tokens = usage["completion_tokens"]
        stats.prompt_tokens = usage["prompt_tokens"]
        stats.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
    for choice in event.get("choices", ()):
        text = choice.get("delta", {}).get("content")
        if text:
            stats.last_s = time.monotonic()
            stats.first_s = stats.first_s if stats.first_s is not None else stats.last_s
            yield text


def _refusal(status: int, body: bytes) -> str:
    try:
        return f"{json.loads(body)['error']['message']} (status {status})"
    except (ValueError, KeyError, TypeError):
        return f"The server answered with status {status}."
