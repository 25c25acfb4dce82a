"""OpenAI's response objects, key for key: a whole body or the chunks of a stream, for both endpoints.

https://platform.openai.com/docs/api-reference/chat and .../completions
"""

from __future__ import annotations

import secrets
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from router.http.logprobs import ChatLogprobs, CompletionLogprobs, LogprobsWriter
from router.text.tool_calls import ToolCallText

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


@dataclass(slots=True)
class Choice:
    """One answer. `extra`: fields beside OpenAI's, and `logprobs` if they were asked for."""

    index: int
    text: str = ""
    tool_calls: list[Payload] = field(default_factory=list)
    finish_reason: str | None = None
    extra: Payload = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Shape(ABC):
    """One response. `null_usage`: every chunk carries `"usage": null`, as it does when a usage chunk will follow."""

    logprobs_writer: ClassVar[type[LogprobsWriter]]

    id: str
    created_s: int
    model: str
    null_usage: bool

    @abstractmethod
    def whole(self, choices: Sequence[Choice], usage: Usage) -> Payload:
        """The body of a response that is not streamed."""

    @abstractmethod
    def opening(self, index: int) -> list[Payload]:
        """Chunks of a choice before its first text."""

    @abstractmethod
    def delta(self, index: int, text: str, extra: Payload) -> Payload:
        """A chunk of text."""

    @abstractmethod
    def end(self, index: int, finish_reason: str) -> Payload:
        """The chunk that says why a choice ends; it has no text."""

    @abstractmethod
    def usage(self, usage: Usage) -> Payload:
        """The last chunk when the client asked for usage: no choices."""


class ChatShape(Shape):
    __slots__ = ()
    logprobs_writer = ChatLogprobs

    def whole(self, choices: Sequence[Choice], usage: Usage) -> Payload:
        return {**self._head("chat.completion"), "choices": [_chat_choice(each) for each in choices]} | {
            "usage": usage.payload()
        }

    def opening(self, index: int) -> list[Payload]:
        return [self._chunk(index, {"role": "assistant", "content": "", "refusal": None}, None, {})]

    def delta(self, index: int, text: str, extra: Payload) -> Payload:
        return self._chunk(index, {"content": text}, None, extra)

    def tool_delta(self, index: int, calls: Sequence[Payload]) -> Payload:
        """`calls`: from `tool_call`, each whole."""
        return self._chunk(index, {"tool_calls": list(calls)}, None, {})

    def end(self, index: int, finish_reason: str) -> Payload:
        return self._chunk(index, {}, finish_reason, {})

    def usage(self, usage: Usage) -> Payload:
        return {**self._head("chat.completion.chunk"), "choices": [], "usage": usage.payload()}

    def _chunk(self, index: int, delta: Payload, finish_reason: str | None, extra: Payload) -> Payload:
        payload = self._head("chat.completion.chunk")
        payload["choices"] = [
            {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason} | extra
        ]
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


def _chat_choice(choice: Choice) -> Payload:
    message: Payload = {"role": "assistant", "content": choice.text, "refusal": None}
    if choice.tool_calls:
        calls = [{key: value for key, value in call.items() if key != "index"} for call in choice.tool_calls]
        message = message | {"content": choice.text or None, "tool_calls": calls}
    fields = {"index": choice.index, "message": message, "logprobs": None, "finish_reason": choice.finish_reason}
    return fields | choice.extra


def tool_call(call: ToolCallText, position: int) -> Payload:
    """As a stream has it; a whole body has it without the `index`."""
    function = {"name": call.name, "arguments": call.arguments}
    return {"index": position, "id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}


class CompletionShape(Shape):
    __slots__ = ()
    logprobs_writer = CompletionLogprobs

    def whole(self, choices: Sequence[Choice], usage: Usage) -> Payload:
        return {
            **self._head(),
            "choices": [self._choice(each.index, each.text, each.finish_reason, each.extra) for each in choices],
            "usage": usage.payload(),
        }

    def opening(self, index: int) -> list[Payload]:
        return []

    def delta(self, index: int, text: str, extra: Payload) -> Payload:
        return self._chunk(index, text, None, extra)

    def end(self, index: int, finish_reason: str) -> Payload:
        return self._chunk(index, "", finish_reason, {})

    def usage(self, usage: Usage) -> Payload:
        return {**self._head(), "choices": [], "usage": usage.payload()}

    def _chunk(self, index: int, text: str, finish_reason: str | None, extra: Payload) -> Payload:
        payload = self._head()
        payload["choices"] = [self._choice(index, text, finish_reason, extra)]
        if self.null_usage:
            payload["usage"] = None
        return payload

    @staticmethod
    def _choice(index: int, text: str, finish_reason: str | None, extra: Payload) -> Payload:
        return {"text": text, "index": index, "logprobs": None, "finish_reason": finish_reason} | extra

    def _head(self) -> Payload:
        return {
            "id": self.id,
            "object": "text_completion",
            "created": self.created_s,
            "model": self.model,
            "system_fingerprint": None,
        }
