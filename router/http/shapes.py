"""OpenAI's response objects, key for key: a whole body or the chunks of a stream, for both endpoints.

https://platform.openai.com/docs/api-reference/chat and .../completions
"""

from __future__ import annotations

import secrets
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from router.http.call import Call
from router.http.exchange import encode_json, sse_event
from router.http.logprobs import ChatLogprobs, CompletionLogprobs, LogprobsWriter
from router.text.tool_calls import ToolCallText

Payload = dict[str, Any]
_MARK = "text"


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


class Shape(ABC):
    """One response. A chunk is an event of its stream."""

    logprobs_writer: ClassVar[type[LogprobsWriter]]
    terminator: ClassVar[bytes] = b"data: [DONE]\n\n"
    prompt_on_top: ClassVar[bool] = False  # what is told of the prompt stands beside the choices, not in them

    def __init__(self, response_id: str, created_s: int, model: str, call: Call) -> None:
        self.id = response_id
        self.created_s = created_s
        self.model = model
        self.call = call

    @abstractmethod
    def whole(self, choices: Sequence[Choice], usage: Usage) -> Payload:
        """The body of a response that is not streamed."""

    @abstractmethod
    def opening(self, index: int) -> list[Payload]:
        """Chunks of a choice before its first text."""

    @abstractmethod
    def delta(self, index: int, text: str, extra: Payload) -> list[Payload]:
        """Chunks of text."""

    def tool_delta(self, index: int, calls: Sequence[Payload]) -> list[Payload]:
        """Chunks of calls, each of which is whole and comes from `tool_call`."""
        raise NotImplementedError("only chats have tools")

    @abstractmethod
    def end(self, index: int, finish_reason: str) -> list[Payload]:
        """The chunks that say why a choice ends; they have no text."""

    @abstractmethod
    def closing(self, usage: Usage, extension: Payload) -> list[Payload]:
        """The last chunks. `extension`: fields beside the API's."""

    @staticmethod
    def event(chunk: Payload) -> bytes:
        return sse_event(chunk)

    def text_events(self, index: int, text: str) -> bytes:
        """The events of `delta` for text that has nothing beside it."""
        return b"".join(map(self.event, self.delta(index, text, {})))


class ChunkShape(Shape):
    """A stream whose chunks differ in their text alone, so that what is around it is encoded once a choice."""

    def __init__(self, response_id: str, created_s: int, model: str, call: Call) -> None:
        super().__init__(response_id, created_s, model, call)
        self._frames: dict[int, tuple[bytes, bytes]] = {}

    def text_events(self, index: int, text: str) -> bytes:
        before, after = self._frames.get(index) or self._frame(index)
        return before + encode_json(text) + after

    def _closing(self, head: Payload, usage: Usage, extension: Payload) -> list[Payload]:
        """A chunk without a choice for what was asked for beside them; none where that is nothing."""
        asked = ({"usage": usage.payload()} if self.call.include_usage else {}) | extension
        return [{**head, "choices": []} | asked] if asked else []

    def _frame(self, index: int) -> tuple[bytes, bytes]:
        # Only numbers and nulls follow the text, so the last mark is that of the text, whatever the model is called.
        before, _, after = super().text_events(index, _MARK).rpartition(encode_json(_MARK))
        self._frames[index] = before, after
        return before, after


class ChatShape(ChunkShape):
    logprobs_writer = ChatLogprobs
    prompt_on_top = True

    def whole(self, choices: Sequence[Choice], usage: Usage) -> Payload:
        return {
            **self._head("chat.completion"),
            "choices": [_chat_choice(each) for each in choices],
            "usage": usage.payload(),
        }

    def opening(self, index: int) -> list[Payload]:
        return [self._chunk(index, {"role": "assistant", "content": "", "refusal": None}, None, {})]

    def delta(self, index: int, text: str, extra: Payload) -> list[Payload]:
        return [self._chunk(index, {"content": text}, None, extra)]

    def tool_delta(self, index: int, calls: Sequence[Payload]) -> list[Payload]:
        return [self._chunk(index, {"tool_calls": list(calls)}, None, {})]

    def end(self, index: int, finish_reason: str) -> list[Payload]:
        return [self._chunk(index, {}, finish_reason, {})]

    def closing(self, usage: Usage, extension: Payload) -> list[Payload]:
        return self._closing(self._head("chat.completion.chunk"), usage, extension)

    def _chunk(self, index: int, delta: Payload, finish_reason: str | None, extra: Payload) -> Payload:
        payload = self._head("chat.completion.chunk")
        payload["choices"] = [
            {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason} | extra
        ]
        if self.call.include_usage:  # a chunk with it follows
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


class CompletionShape(ChunkShape):
    logprobs_writer = CompletionLogprobs

    def whole(self, choices: Sequence[Choice], usage: Usage) -> Payload:
        return {
            **self._head(),
            "choices": [self._choice(each.index, each.text, each.finish_reason, each.extra) for each in choices],
            "usage": usage.payload(),
        }

    def opening(self, index: int) -> list[Payload]:
        return []

    def delta(self, index: int, text: str, extra: Payload) -> list[Payload]:
        return [self._chunk(index, text, None, extra)]

    def end(self, index: int, finish_reason: str) -> list[Payload]:
        return [self._chunk(index, "", finish_reason, {})]

    def closing(self, usage: Usage, extension: Payload) -> list[Payload]:
        return self._closing(self._head(), usage, extension)

    def _chunk(self, index: int, text: str, finish_reason: str | None, extra: Payload) -> Payload:
        payload = self._head()
        payload["choices"] = [self._choice(index, text, finish_reason, extra)]
        if self.call.include_usage:  # a chunk with it follows
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
