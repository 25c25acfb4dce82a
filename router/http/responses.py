"""The objects of the Responses API: a whole response, or the events of a stream.

https://platform.openai.com/docs/api-reference/responses
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from router.http.call import Call
from router.http.exchange import sse_event
from router.http.logprobs import ChatLogprobs
from router.http.shapes import Choice, Payload, Shape, Usage


class ResponsesShape(Shape):
    """Holds the text of a stream: its last events repeat it."""

    logprobs_writer = ChatLogprobs
    terminator = b""

    def __init__(self, response_id: str, created_s: int, model: str, call: Call) -> None:
        super().__init__(response_id, created_s, model, call)
        self._choice = Choice(0)
        self._sequence = 0
        self._begun = False  # the message's item was announced

    def whole(self, choices: Sequence[Choice], usage: Usage) -> Payload:
        return self._response(choices[0], usage)

    def opening(self, index: int) -> list[Payload]:
        response = self._response(None, None)
        return [self._chunk(f"response.{state}", response=response) for state in ("created", "in_progress")]

    def delta(self, index: int, text: str, extra: Payload) -> list[Payload]:
        chunks = [] if self._begun else self._begin()
        self._choice.text += text
        logprobs = extra.get("logprobs")
        told = [] if logprobs is None else logprobs["content"]
        self._choice.extra.setdefault("logprobs", {"content": []})["content"] += told
        return [*chunks, self._of_text("response.output_text.delta", delta=text, logprobs=told)]

    def tool_delta(self, index: int, calls: Sequence[Payload]) -> list[Payload]:
        """A call's item has its place behind the message, if there is one."""
        chunks: list[Payload] = []
        for call in calls:
            place = len(self._choice.tool_calls) + self._begun
            self._choice.tool_calls.append(call)
            item = _call_item(call)
            where = {"item_id": item["id"], "output_index": place}
            begun = item | {"status": "in_progress", "arguments": ""}
            chunks += [
                self._chunk("response.output_item.added", output_index=place, item=begun),
                self._chunk("response.function_call_arguments.delta", **where, delta=item["arguments"]),
                self._chunk("response.function_call_arguments.done", **where, arguments=item["arguments"]),
                self._chunk("response.output_item.done", output_index=place, item=item),
            ]
        return chunks

    def end(self, index: int, finish_reason: str) -> list[Payload]:
        self._choice.finish_reason = finish_reason
        if not self._begun:
            return []
        part, item = _text_part(self._choice), self._message_item(self._choice)
        return [
            self._of_text("response.output_text.done", text=self._choice.text, logprobs=part["logprobs"]),
            self._of_text("response.content_part.done", part=part),
            self._chunk("response.output_item.done", output_index=0, item=item),
        ]

    def closing(self, usage: Usage, extension: Payload) -> list[Payload]:
        response = self._response(self._choice, usage) | extension
        return [self._chunk(f"response.{response['status']}", response=response)]

    @staticmethod
    def event(chunk: Payload) -> bytes:
        return f"event: {chunk['type']}\n".encode() + sse_event(chunk)

    def _begin(self) -> list[Payload]:
        self._begun = True
        item = self._message_item(None)
        return [
            self._chunk("response.output_item.added", output_index=0, item=item),
            self._of_text("response.content_part.added", part=_text_part(None)),
        ]

    def _of_text(self, kind: str, **fields: Any) -> Payload:
        return self._chunk(kind, item_id=f"msg_{self.id}", output_index=0, content_index=0, **fields)

    def _chunk(self, kind: str, **fields: Any) -> Payload:
        self._sequence += 1
        return {"type": kind, "sequence_number": self._sequence - 1, **fields}

    def _message_item(self, choice: Choice | None) -> Payload:
        return {
            "type": "message",
            "id": f"msg_{self.id}",
            "status": "in_progress" if choice is None else _status(choice),
            "role": "assistant",
            "content": [] if choice is None else [_text_part(choice)],
        }

    def _response(self, choice: Choice | None, usage: Usage | None) -> Payload:
        """`choice`: None while it is generated."""
        output: list[Payload] = []
        if choice is not None:
            output += [self._message_item(choice)] if choice.text or not choice.tool_calls else []
            output += map(_call_item, choice.tool_calls)
        cut = choice is not None and _status(choice) == "incomplete"
        sampling = self.call.sampling
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created_s,
            "status": "in_progress" if choice is None else _status(choice),
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "max_output_tokens": sampling.max_tokens,
            "model": self.model,
            "output": output,
            "previous_response_id": None,
            "store": False,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "truncation": "disabled",
            "usage": None if usage is None else _usage(usage),
            **self.call.repeated,
        }


def _status(choice: Choice) -> str:
    return "incomplete" if choice.finish_reason == "length" else "completed"


def _text_part(choice: Choice | None) -> Payload:
    logprobs = None if choice is None else choice.extra.get("logprobs")
    return {
        "type": "output_text",
        "text": "" if choice is None else choice.text,
        "annotations": [],
        "logprobs": [] if logprobs is None else logprobs["content"],
    }


def _call_item(call: Payload) -> Payload:
    return {
        "type": "function_call",
        "id": call["id"].replace("call_", "fc_"),
        "call_id": call["id"],
        "name": call["function"]["name"],
        "arguments": call["function"]["arguments"],
        "status": "completed",
    }


def _usage(usage: Usage) -> Payload:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }
