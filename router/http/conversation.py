"""Messages and tools to the prompt of a chat."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pdserve.errors import InvalidRequest
from pdserve.protocol.codec import MAX_GRAMMAR_BYTES
from pdserve.request import Grammar
from router.http.schema import ChatRequest, Function, Message, Tool, ToolChoice
from router.http.service import ServedModel
from router.http.structured import requested_grammar
from router.text.chat_template import ChatTemplate
from router.text.tool_formats import LLAMA3, ToolFormat, find_format
from router.text.tool_grammar import Callee, calls_or_json, forced_calls, free_calls


@dataclass(frozen=True, slots=True)
class Tooling:
    """How the answer may call tools.

    Attributes:
        tools: as the template takes them.
        grammar: of the whole answer, if something holds its calls or they are forced.
        forced: it must call one.
    """

    format: ToolFormat
    tools: tuple[Mapping[str, Any], ...]
    grammar: Grammar | None
    forced: bool


def tool_format_of(template: ChatTemplate) -> ToolFormat | None:
    """How the model was taught to call tools; None if it was not, or in a format that is not known here."""
    return find_format(template.source) if template.takes_tools else None


def tooling_of(request: ChatRequest, model: ServedModel) -> Tooling | None:
    """None when the answer calls none. Raises InvalidRequest."""
    choice = request.tool_choice or "auto"
    if not request.tools:
        if choice not in ("none", "auto"):
            raise InvalidRequest("'tool_choice' is only allowed when 'tools' are given.", param="tool_choice")
        return None
    if choice == "none":
        return None
    assert model.chat_template is not None
    tool_format = tool_format_of(model.chat_template)
    if tool_format is None:
        raise InvalidRequest(
            f"The model '{model.name}' was not taught to call tools: its chat template has no format for them.",
            param="tools",
            code="unsupported_parameter",
        )
    tools = tuple(map(_tool_payload, request.tools))
    if choice == "auto":
        return Tooling(tool_format, tools, _free(request, request.tools, tool_format, model), forced=False)
    several = bool(request.parallel_tool_calls)
    grammar = forced_calls(tool_format, _forced(choice, request.tools), model.tokenizer, several=several)
    return Tooling(tool_format, tools, _bounded(grammar), forced=True)


def _forced(choice: str | ToolChoice, tools: Sequence[Tool]) -> list[Callee]:
    """The functions of which one has to be called. Raises InvalidRequest."""
    functions = [tool.function for tool in tools]
    if isinstance(choice, ToolChoice):
        functions = [function for function in functions if function.name == choice.function.name]
        if not functions:
            raise InvalidRequest("'tool_choice' names none of the 'tools'.", param="tool_choice")
    return [_callee(function) for function in functions]


def _free(request: ChatRequest, tools: Sequence[Tool], tool_format: ToolFormat, model: ServedModel) -> Grammar | None:
    """The grammar of an answer that may call what it will; None where nothing holds its calls."""
    held = any(tool.function.strict for tool in tools)
    several = request.parallel_tool_calls is not False
    callees = [_callee(tool.function) if tool.function.strict else Callee(tool.function.name) for tool in tools]
    asked = requested_grammar(request)
    if asked is not None:
        if asked.grammar.kind != "json_schema" or tool_format is LLAMA3:
            return None  # the answer's own grammar, which calls do not fit
        return _bounded(calls_or_json(tool_format, callees, model.tokenizer, asked.grammar.source, several=several))
    if not held and several:
        return None
    return _bounded(free_calls(tool_format, callees, model.tokenizer, model.eos_token_ids, several=several))


def _bounded(grammar: Grammar) -> Grammar:
    """Raises InvalidRequest."""
    if len(grammar.source.encode()) > MAX_GRAMMAR_BYTES:
        raise InvalidRequest(f"The schemas of 'tools' have over {MAX_GRAMMAR_BYTES} bytes together.", param="tools")
    return grammar


def _callee(function: Function) -> Callee:
    """Its arguments hold to its schema."""
    return Callee(function.name, None if function.parameters is None else json.loads(function.parameters))


def prompt_text(request: ChatRequest, template: ChatTemplate, tooling: Tooling | None) -> str:
    """Raises InvalidRequest."""
    messages = [_message_payload(message, index) for index, message in enumerate(request.messages)]
    variables = dict(request.chat_template_kwargs or {})
    if request.reasoning_effort is not None:
        if "reasoning_effort" not in template.variables:
            raise InvalidRequest(
                "'reasoning_effort' is not supported: the model's chat template does not know it.",
                param="reasoning_effort",
                code="unsupported_parameter",
            )
        variables["reasoning_effort"] = request.reasoning_effort
    if request.continue_final_message and request.add_generation_prompt:
        raise InvalidRequest(
            "'continue_final_message' and 'add_generation_prompt' exclude each other.", param="continue_final_message"
        )
    begins_answer = request.add_generation_prompt is not False and not request.continue_final_message
    tools = tooling.tools if tooling is not None else None
    text = template.render(messages, tools=tools, add_generation_prompt=begins_answer, variables=variables)
    return _cut_behind(text, messages[-1]) if request.continue_final_message else text


def _cut_behind(text: str, final: Mapping[str, Any]) -> str:
    """Up to the end of the last message's content, which the answer continues. Raises InvalidRequest."""
    content = final["content"] if final["role"] == "assistant" else ""
    for wanted in (content, content.strip()):
        if wanted and wanted in text:
            return text[: text.rindex(wanted) + len(wanted)]
    raise InvalidRequest(
        "'continue_final_message' needs a last message of the assistant, which the chat template writes out.",
        param="continue_final_message",
    )


def _message_payload(message: Message, index: int) -> dict[str, Any]:
    """As templates expect messages: arguments of calls are objects there, not JSON in a string."""
    payload = message.model_dump(exclude_none=True)
    payload.setdefault("content", "")
    if not payload.get("tool_calls"):
        payload.pop("tool_calls", None)
    for call in payload.get("tool_calls", ()):
        try:
            arguments = json.loads(call["function"]["arguments"] or "{}")
        except (ValueError, RecursionError):
            arguments = None
        if not isinstance(arguments, dict):
            raise InvalidRequest(
                f"The arguments of a call in 'messages[{index}]' are no JSON object.",
                param=f"messages[{index}].tool_calls",
            )
        call["function"]["arguments"] = arguments
    return payload


def _tool_payload(tool: Tool) -> Mapping[str, Any]:
    function = tool.function.model_dump(exclude_none=True, exclude={"parameters", "strict"})
    parameters = tool.function.parameters
    return {
        "type": "function",
        "function": {**function, **({"parameters": json.loads(parameters)} if parameters is not None else {})},
    }
