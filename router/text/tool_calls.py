"""How models write tool calls, and how their text is read back. The chat template tells which way a model has.

hermes    <tool_call>{"name": "f", "arguments": {...}}</tool_call>     Qwen, Hermes, SmolLM
mistral   [TOOL_CALLS][{"name": "f", "arguments": {...}}]               Mistral
          [TOOL_CALLS]f[ARGS]{...}                                      Mistral from Small 3.2 on
llama3    {"name": "f", "parameters": {...}}, as the whole answer       Llama 3.1 to 3.3
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pdserve.request import Grammar
from router.text.tokenizer import Tokenizer


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


@dataclass(frozen=True, slots=True)
class ToolCallText:
    name: str
    arguments: str  # JSON


def find_format(template: str) -> ToolFormat | None:
    """The format that the source of a chat template writes calls in; None for one that this does not know."""
    signs = ((HERMES, HERMES.begin), (MISTRAL_NAMED, "[ARGS]"), (MISTRAL, MISTRAL.begin), (LLAMA3, "parameters"))
    return next((tool_format for tool_format, sign in signs if sign in template), None)


def forced_calls(
    tool_format: ToolFormat, functions: Sequence[Mapping[str, Any]], tokenizer: Tokenizer, *, several: bool
) -> Grammar:
    """The grammar of an answer that calls one of `functions`, or `several`, and says nothing else.

    Args:
        functions: each with a `name`, and its `parameters` as a JSON schema if it has any.
    """
    begin, end, named = (_terminal(x, tokenizer) for x in (tool_format.begin, tool_format.end, tool_format.named))
    opening, closing = json.dumps(tool_format.opening), json.dumps(tool_format.closing)
    one = " | ".join(f"function_{i}" for i in range(len(functions)))
    more = f' (", " ({one}))*' if tool_format is MISTRAL and several else ""
    lines = [
        f"start: call{'+' if several and tool_format in (HERMES, MISTRAL_NAMED) else ''}",
        f"call: {begin} {opening} ({one}){more} {closing} {end}",
    ]
    for i, function in enumerate(functions):
        schema = {"x-guidance": {"whitespace_flexible": False}} | (function.get("parameters") or {"type": "object"})
        name = json.dumps(function["name"])
        if tool_format.named:
            lines.append(f"function_{i}: {name} {named} arguments_{i}")
        else:
            head = json.dumps(f'{{"name": {name}, "{tool_format.arguments}": ')
            lines.append(f'function_{i}: {head} arguments_{i} "}}"')
        lines.append(f"arguments_{i}: %json {json.dumps(schema)}")
    return Grammar("lark", "\n".join(lines))


def _terminal(text: str, tokenizer: Tokenizer) -> str:
    """A special token is no text to the grammar."""
    special = next((token_id for token_id, content in tokenizer.special_tokens.items() if content == text), None)
    return json.dumps(text) if special is None else f"<[{special}]>"


class ToolCallParser:
    """Splits an answer, as it comes, into the text around calls and the calls. What is no call after all stays text.

    Line breaks before a call belong to it, so they are held back too.
    """

    def __init__(self, tool_format: ToolFormat) -> None:
        self._format = tool_format
        self._held = ""  # text that may begin a call, or the call so far
        self._inside = False
        self._passed = False  # something of the answer was passed on
        self._called = False

    def push(self, text: str) -> tuple[str, list[ToolCallText]]:
        self._held += text
        content, calls = "", list[ToolCallText]()
        while True:
            if not self._inside:
                content += self._enter() if self._format.begin else self._enter_whole()
            self._passed = self._passed or bool(content)
            end = self._format.end
            if not self._inside or not end or end not in self._held:
                return content, calls
            body, _, self._held = self._held.partition(end)
            self._inside = False
            found = parse_calls(body)
            if found is None:
                content += self._format.begin + body + end
            else:
                calls += found
                self._called = True

    def flush(self) -> tuple[str, list[ToolCallText]]:
        """The rest, at the end of the answer."""
        held, self._held = self._held, ""
        if not self._inside:
            return ("" if self._called and not held.strip() else held), []
        if self._format.named:
            found = parse_named(held, self._format)
        else:
            found = parse_calls(held.removeprefix(self._format.mark) if self._format.mark else held)
        return (self._format.begin + held, []) if found is None else ("", found)

    def _enter(self) -> str:
        """Text that is certainly none of a call's; takes off the beginning of one and enters it."""
        begin = self._format.begin
        text, found, rest = self._held.partition(begin)
        if found:
            self._inside, self._held = True, rest
            return text.rstrip("\n")
        kept = next((n for n in range(min(len(begin) - 1, len(text)), 0, -1) if text.endswith(begin[:n])), 0)
        certain = len(text[: len(text) - kept].rstrip("\n"))
        self._held = text[certain:]
        return text[:certain]

    def _enter_whole(self) -> str:
        """The same where a call is the whole answer: its first characters tell."""
        start = self._held.lstrip()
        mark = self._format.mark
        if not self._passed:
            self._inside = start.startswith(("{", mark))
            if self._inside or mark.startswith(start):  # or it may become one
                self._held = start if self._inside else self._held
                return ""
        text, self._held = self._held, ""
        return text


def parse_calls(text: str) -> list[ToolCallText] | None:
    """The calls in JSON objects, one after the other or in an array; None if that is not what the text is."""
    decoder = json.JSONDecoder()
    calls: list[ToolCallText] = []
    rest = text.strip()
    while rest:
        try:
            value, end = decoder.raw_decode(rest)
        except (ValueError, RecursionError):
            return None
        for item in value if isinstance(value, list) else [value]:
            call = _call_of(item)
            if call is None:
                return None
            calls.append(call)
        rest = rest[end:].lstrip(" \n\t;,")
    return calls or None


def parse_named(text: str, tool_format: ToolFormat) -> list[ToolCallText] | None:
    """The calls in `name[ARGS]{...}`, each after the first with `begin` before it, or in the older form; else None.

    An id may stand behind the name. Marks that are special tokens may be missing from the text.
    """
    calls: list[ToolCallText] = []
    for part in filter(None, map(str.strip, text.split(tool_format.begin))):
        head, brace, arguments = part.partition("{")
        name = head.removesuffix(tool_format.named).partition("[CALL_ID]")[0].strip()
        try:
            json.loads(brace + arguments)
        except (ValueError, RecursionError):
            return parse_calls(text)
        if not name or "[" in name:
            return parse_calls(text)
        calls.append(ToolCallText(name, brace + arguments))
    return calls or None


def _call_of(item: Any) -> ToolCallText | None:
    if not isinstance(item, dict) or not isinstance(item.get("name"), str):
        return None
    arguments = item.get("arguments", item.get("parameters", {}))
    if isinstance(arguments, str):
        return ToolCallText(item["name"], arguments)
    return ToolCallText(item["name"], json.dumps(arguments, ensure_ascii=False))
