"""The Responses API, as far as it is stateless text: a request is turned into a chat, an answer into output items.

https://platform.openai.com/docs/api-reference/responses
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from pdserve.errors import InvalidRequest
from router.http.body import decode_body
from router.http.call import Call, chat_call
from router.http.exchange import sse_event
from router.http.fields import Content, JsonSchema, Metadata, TopLogprobs
from router.http.logprobs import ChatLogprobs
from router.http.schema import MAX_MESSAGES, MAX_TOOLS, FunctionName, Strict, parse
from router.http.service import ServedModel
from router.http.shapes import Choice, Payload, Shape, Usage

# What may be left as it is by default; anything else about it needs state, or what the models cannot do.
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "background": (False,),
    "conversation": (),
    "include": ([],),
    "max_tool_calls": (),
    "previous_response_id": (),
    "prompt": (),
    "prompt_cache_key": (),
    "reasoning": ({},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "truncation": ("disabled",),
}


class InputItem(Strict):
    """A message, a call that the model made, or what came of one."""

    type: Literal["message", "function_call", "function_call_output"] = "message"
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: Any = None
    id: str | None = None
    status: str | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | None = None


class TextFormat(Strict):
    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    json_schema: Annotated[JsonSchema | None, Field(alias="schema")] = None
    description: str | None = None
    strict: bool | None = None


class Text(Strict):
    format: TextFormat | None = None


class FunctionTool(Strict):
    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: JsonSchema | None = None
    strict: bool | None = None


class NamedFunction(FunctionName):
    type: Literal["function"]


class ResponsesRequest(Strict):
    """Body of /v1/responses."""

    model: str
    input: str | Annotated[list[InputItem], Field(min_length=1, max_length=MAX_MESSAGES)]
    instructions: str | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_logprobs: TopLogprobs | None = None
    text: Text | None = None
    tools: Annotated[list[FunctionTool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedFunction | None = None
    parallel_tool_calls: bool | None = None
    stream: bool | None = None
    user: str | None = None
    safety_identifier: str | None = None
    metadata: Metadata | None = None


def responses_call(body: bytes, model: ServedModel, drawn_seed: int) -> Call:
    """Raises InvalidRequest or ModelNotFound; a field of the chat that it becomes may be named."""
    fields = decode_body(body)
    if fields.get("store") is None:
        fields["store"] = False  # the API's default is to keep the response, and nothing is kept here
    request = parse(ResponsesRequest, fields, _NEUTRAL)
    chat = {
        "model": request.model,
        "messages": _messages(request),
        "max_completion_tokens": request.max_output_tokens,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "logprobs": True if request.top_logprobs is not None else None,
        "top_logprobs": request.top_logprobs,
        "response_format": _response_format(request.text),
        "tools": [{"type": "function", "function": _function(tool)} for tool in request.tools or ()] or None,
        "tool_choice": _tool_choice(request.tool_choice),
        "parallel_tool_calls": request.parallel_tool_calls,
        "stream": request.stream,
    }
    return chat_call(json.dumps(chat).encode(), model, drawn_seed)


def _messages(request: ResponsesRequest) -> list[Payload]:
    messages: list[Payload] = []
    if request.instructions is not None:
        messages.append({"role": "system", "content": request.instructions})
    if isinstance(request.input, str):
        return [*messages, {"role": "user", "content": request.input}]
    for index, item in enumerate(request.input):
        messages.append(_message(item, f"input[{index}]"))
    return messages


def _message(item: InputItem, where: str) -> Payload:
    if item.type == "function_call":
        function = {"name": item.name, "arguments": item.arguments}
        return {"role": "assistant", "tool_calls": [{"id": item.call_id, "type": "function", "function": function}]}
    if item.type == "function_call_output":
        return {"role": "tool", "tool_call_id": item.call_id, "content": item.output}
    if item.role is None:
        raise InvalidRequest(f"'{where}.role' is required.", param=f"{where}.role", code="missing_required_parameter")
    return {"role": item.role, "content": _content(item.content, where)}


def _content(content: Any, where: str) -> Content:
    """A string, or text parts under the names that this API has for them."""
    if not isinstance(content, list):
        return content if isinstance(content, str) else None
    for part in content:
        if not isinstance(part, dict) or part.get("type") not in ("input_text", "output_text", "text"):
            param = f"{where}.content"
            raise InvalidRequest(f"Invalid value for '{param}': parts other than text are not supported.", param=param)
    return "\n".join(str(part.get("text", "")) for part in content)


def _response_format(text: Text | None) -> Payload | None:
    if text is None or text.format is None:
        return None
    form = text.format
    if form.type != "json_schema":
        return {"type": form.type}
    if form.json_schema is None:
        raise InvalidRequest("'text.format.schema' is required.", param="text.format.schema")
    schema = {"name": form.name or "response", "schema": json.loads(form.json_schema)}
    return {"type": "json_schema", "json_schema": schema}


def _function(tool: FunctionTool) -> Payload:
    parameters = None if tool.parameters is None else json.loads(tool.parameters)
    strict = tool.strict is not False  # this API's default, unlike that of chats
    return {"name": tool.name, "description": tool.description, "parameters": parameters, "strict": strict}


def _tool_choice(choice: str | NamedFunction | None) -> Any:
    return {"type": "function", "function": {"name": choice.name}} if isinstance(choice, NamedFunction) else choice


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
            "instructions": None,
            "max_output_tokens": sampling.max_tokens,
            "metadata": {},
            "model": self.model,
            "output": output,
            "parallel_tool_calls": True,
            "previous_response_id": None,
            "store": False,
            "temperature": sampling.temperature,
            "text": {"format": {"type": "text"}},
            "tool_choice": "auto",
            "tools": [],
            "top_p": sampling.top_p,
            "truncation": "disabled",
            "usage": None if usage is None else _usage(usage),
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
