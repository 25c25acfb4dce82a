"""A request of the Responses API, as far as it is stateless text: checked, and turned into a chat.

https://platform.openai.com/docs/api-reference/responses
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import Field

from pdserve.errors import InvalidRequest
from router.http.body import decode_body
from router.http.call import Call, chat_call
from router.http.fields import Content, JsonSchema, Metadata, Tokens, TopLogprobs
from router.http.schema import MAX_MESSAGES, MAX_TOOLS, NAME, FunctionName, Strict, parse
from router.http.service import ServedModel
from router.http.shapes import Payload

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
    output: Any = None


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
    name: Annotated[str, Field(pattern=NAME)]
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
    max_output_tokens: Tokens | None = None
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
    return replace(chat_call(json.dumps(chat).encode(), model, drawn_seed), repeated=_repeated(request, fields))


def _repeated(request: ResponsesRequest, fields: Payload) -> Payload:
    """What the response says of its request, as it came."""
    form = (fields.get("text") or {}).get("format") or {"type": "text"}
    tools = [{"type": tool.type, **_function(tool)} for tool in request.tools or ()]
    return {
        "instructions": request.instructions,
        "metadata": request.metadata or {},
        "parallel_tool_calls": request.parallel_tool_calls is not False,
        "text": {"format": form},
        "tool_choice": fields.get("tool_choice") or "auto",
        "tools": tools,
        "top_logprobs": request.top_logprobs or 0,
        "user": request.user,
    }


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
    if item.type != "message" and item.call_id is None:
        raise _missing(f"{where}.call_id")
    if item.type == "function_call":
        function = {"name": item.name, "arguments": item.arguments}
        return {"role": "assistant", "tool_calls": [{"id": item.call_id, "type": "function", "function": function}]}
    if item.type == "function_call_output":
        return {"role": "tool", "tool_call_id": item.call_id, "content": _content(item.output, f"{where}.output")}
    if item.role is None:
        raise _missing(f"{where}.role")
    return {"role": item.role, "content": _content(item.content, f"{where}.content")}


def _missing(param: str) -> InvalidRequest:
    return InvalidRequest(f"'{param}' is required.", param=param, code="missing_required_parameter")


def _content(content: Any, param: str) -> Content:
    """A string, or text parts under the names that this API has for them. Raises InvalidRequest."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise InvalidRequest(f"Invalid value for '{param}': must be a string or an array of text parts.", param=param)
    for part in content:
        if not isinstance(part, dict) or part.get("type") not in ("input_text", "output_text", "text"):
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
