"""OpenAI's response objects, key for key: a whole body or the chunks of a stream, for both endpoints.

https://platform.openai.com/docs/api-reference/chat and .../completions
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from pdserve.request import FinishReason

Payload = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int  # of the prompt

    def payload(self) -> Payload:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


@dataclass(frozen=True, slots=True)
class Shape(ABC):
    """One response. `null_usage`: every chunk carries `"usage": null`, as it does when a usage chunk will follow."""

    id: str
    created_s: int
    model: str
    null_usage: bool

    @abstractmethod
    def whole(self, text: str, finish_reason: FinishReason, usage: Usage) -> Payload:
        """The body of a response that is not streamed."""

    @abstractmethod
    def opening(self) -> list[Payload]:
        """Chunks before the first text."""

    @abstractmethod
    def delta(self, text: str) -> Payload:
        """A chunk of text."""

    @abstractmethod
    def end(self, finish_reason: FinishReason) -> Payload:
        """The chunk that says why the text ends; it has no text."""

    @abstractmethod
    def usage(self, usage: Usage) -> Payload:
        """The last chunk when the client asked for usage: no choices."""


class ChatShape(Shape):
    __slots__ = ()

    def whole(self, text: str, finish_reason: FinishReason, usage: Usage) -> Payload:
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish_reason.value}
        return {**self._head("chat.completion"), "choices": [choice], "usage": usage.payload()}

    def opening(self) -> list[Payload]:
        return [self._chunk({"role": "assistant", "content": "", "refusal": None}, None)]

    def delta(self, text: str) -> Payload:
        return self._chunk({"content": text}, None)

    def end(self, finish_reason: FinishReason) -> Payload:
        return self._chunk({}, finish_reason.value)

    def usage(self, usage: Usage) -> Payload:
        return {**self._head("chat.completion.chunk"), "choices": [], "usage": usage.payload()}

    def _chunk(self, delta: Payload, finish_reason: str | None) -> Payload:
        payload = self._head("chat.completion.chunk")
        payload["choices"] = [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}]
        if self.null_usage:
            payload["usage"] = None
        return payload

    def _head(self, kind: str) -> Payload:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created_s,
            "model": self.model,
            "system_fingerprint": None,
        }


class CompletionShape(Shape):
    __slots__ = ()

    def whole(self, text: str, finish_reason: FinishReason, usage: Usage) -> Payload:
        return {**self._body(text, finish_reason.value), "usage": usage.payload()}

    def opening(self) -> list[Payload]:
        return []

    def delta(self, text: str) -> Payload:
        return self._chunk(text, None)

    def end(self, finish_reason: FinishReason) -> Payload:
        return self._chunk("", finish_reason.value)

    def usage(self, usage: Usage) -> Payload:
        return {**self._body("", None), "choices": [], "usage": usage.payload()}

    def _chunk(self, text: str, finish_reason: str | None) -> Payload:
        payload = self._body(text, finish_reason)
        if self.null_usage:
            payload["usage"] = None
        return payload

    def _body(self, text: str, finish_reason: str | None) -> Payload:
        return {
            "id": self.id,
            "object": "text_completion",
            "created": self.created_s,
            "model": self.model,
            "system_fingerprint": None,
            "choices": [{"text": text, "index": 0, "logprobs": None, "finish_reason": finish_reason}],
        }
