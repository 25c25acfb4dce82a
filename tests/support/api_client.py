"""A client of the HTTP API on bare sockets: one connection a request, so a disconnect is what a test says it is."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

GREEDY = {"temperature": 0, "max_tokens": 24}

Prompt = str | Sequence[int]
Messages = Sequence[dict[str, str]]


class ApiError(Exception):
    """An error response, or an error event in a stream."""


@dataclass(frozen=True, slots=True)
class Answer:
    text: str
    finish_reason: str
    usage: dict[str, Any]
    extension: dict[str, Any] = field(default_factory=dict)

    @property
    def output_tokens(self) -> int:
        return int(self.usage["completion_tokens"])

    @property
    def cached_by_tier(self) -> dict[str, int]:
        """Only of a client with `timeline`."""
        return dict(self.extension["cached_tokens"])

    @property
    def cached_tokens(self) -> int:
        return int(self.usage["prompt_tokens_details"]["cached_tokens"])


@dataclass(frozen=True, slots=True)
class ApiClient:
    """Greedy, with 24 output tokens, unless the body says otherwise. `timeout_s` bounds every wait for bytes."""

    port: int
    model: str
    timeout_s: float = 120.0
    headers: Mapping[str, str] = field(default_factory=dict)

    def complete(self, prompt: Prompt, **options: Any) -> Answer:
        return self.ask({"prompt": prompt, **options})

    def chat(self, messages: Messages, **options: Any) -> Answer:
        return self.ask({"messages": messages, **options})

    def ask(self, body: dict[str, Any]) -> Answer:
        """`body` has a prompt or messages. Raises ApiError."""
        with self.send(body) as connection, connection.getresponse() as response:
            answer = json.loads(response.read())
        if response.status != 200:
            raise ApiError(response.status, answer)
        choice = answer["choices"][0]
        text = choice["text"] if "prompt" in body else choice["message"]["content"]
        return Answer(text, choice["finish_reason"], answer["usage"], answer.get("x_pdserve", {}))

    def stream(self, body: dict[str, Any]) -> Stream:
        """Returns with the first token. Raises ApiError."""
        return Stream(self.send({**body, "stream": True, "stream_options": {"include_usage": True}}))

    def send(self, body: dict[str, Any]) -> Connection:
        """The request alone; closing the connection is a disconnect. Raises nothing before the response is read."""
        connection = Connection("127.0.0.1", self.port, timeout=self.timeout_s)
        path = "/v1/completions" if "prompt" in body else "/v1/chat/completions"
        content = json.dumps({"model": self.model, **GREEDY, **body})
        connection.request("POST", path, content, {"Content-Type": "application/json", **self.headers})
        return connection


class Connection(http.client.HTTPConnection):
    def __enter__(self) -> Connection:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Stream:
    """Iterating gives pieces of text; leaving it as a context manager before the end is a disconnect.

    Attributes:
        request_id: the one that the workers know.
        finish_reason: None until the end.
        longest_gap_s: between two events.
    """

    def __init__(self, connection: Connection) -> None:
        self.text = ""
        self.finish_reason: str | None = None
        self.usage: dict[str, Any] = {}
        self.longest_gap_s = 0.0
        self._connection = connection
        self._response = connection.getresponse()
        if self._response.status != 200:
            with self:
                raise ApiError(self._response.status, self._response.read())
        first = self._event()
        assert first is not None
        self.request_id: str = first["id"]
        self._first: dict[str, Any] | None = first

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._response.close()
        self._connection.close()

    def read(self, num_pieces: int) -> None:
        """The next pieces, into `text`."""
        pieces = iter(self)
        for _ in range(num_pieces):
            next(pieces)

    def finish(self) -> Answer:
        """The rest. Raises ApiError for an error event or an end without [DONE]."""
        with self:
            for _ in self:
                pass
        assert self.finish_reason is not None
        return Answer(self.text, self.finish_reason, self.usage)

    def __iter__(self) -> Iterator[str]:
        while (event := self._first or self._event()) is not None:
            self._first = None
            if event.get("usage"):
                self.usage = event["usage"]
            for choice in event["choices"]:
                piece: str = choice["text"] if "text" in choice else choice["delta"].get("content") or ""
                self.finish_reason = choice["finish_reason"] or self.finish_reason
                self.text += piece
                if piece:
                    yield piece

    def _event(self) -> dict[str, Any] | None:
        """None after [DONE]."""
        began_s = time.monotonic()
        while (line := self._response.readline()) == b"\n":
            pass
        self.longest_gap_s = max(self.longest_gap_s, time.monotonic() - began_s)
        if not line.startswith(b"data: "):
            raise ApiError("the stream ended without [DONE]", line)
        if line == b"data: [DONE]\n":
            return None
        event: dict[str, Any] = json.loads(line[len(b"data: ") :])
        if "error" in event:
            raise ApiError(event["error"])
        return event
