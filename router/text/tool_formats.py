"""How models write tool calls. The chat template tells which way a model has.

hermes    <tool_call>{"name": "f", "arguments": {...}}</tool_call>     Qwen, Hermes, SmolLM
mistral   [TOOL_CALLS][{"name": "f", "arguments": {...}}]               Mistral
          [TOOL_CALLS]f[ARGS]{...}                                      Mistral from Small 3.2 on
llama3    {"name": "f", "parameters": {...}}, as the whole answer       Llama 3.1 to 3.3
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """`begin` is written before a call; "" if a call is the whole answer, which may then start with `mark`.
    `end` is written after it; "" if the answer ends there."""

    name: str
    begin: str
    end: str
    arguments: str  # the key that they have
    opening: str = ""  # between `begin` and the JSON
    closing: str = ""
    mark: str = ""
    named: str = ""  # between the name and the arguments, where a call is these two and not one JSON object


HERMES = ToolFormat("hermes", "<tool_call>", "</tool_call>", "arguments", "\n", "\n")
MISTRAL = ToolFormat("mistral", "[TOOL_CALLS]", "", "arguments", "[", "]")
MISTRAL_NAMED = ToolFormat("mistral", "[TOOL_CALLS]", "", "", named="[ARGS]")
LLAMA3 = ToolFormat("llama3", "", "", "parameters", mark="<|python_tag|>")


def find_format(template: str) -> ToolFormat | None:
    """The format that the source of a chat template writes calls in; None for one that this does not know."""
    signs = ((HERMES, HERMES.begin), (MISTRAL_NAMED, "[ARGS]"), (MISTRAL, MISTRAL.begin), (LLAMA3, "parameters"))
    return next((tool_format for tool_format, sign in signs if sign in template), None)
