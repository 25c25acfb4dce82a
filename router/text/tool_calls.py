"""Tool calls are read from the text of an answer, in the format that the model has."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import msgspec

from router.text.tool_formats import ToolFormat


@dataclass(frozen=True, slots=True)
class ToolCallText:
    name: str
    arguments: str  # JSON, as the model wrote it


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
            _, end = decoder.raw_decode(rest)
            calls += _calls_of(rest[:end])
        except (ValueError, msgspec.MsgspecError, RecursionError):
            return None
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
            msgspec.json.decode(brace + arguments)
        except (msgspec.MsgspecError, RecursionError):
            return parse_calls(text)
        if not name or "[" in name:
            return parse_calls(text)
        calls.append(ToolCallText(name, brace + arguments))
    return calls or None


class _Written(msgspec.Struct):
    name: str
    arguments: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    parameters: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET


def _calls_of(text: str) -> list[ToolCallText]:
    """Of one JSON value. Raises msgspec.MsgspecError if it is no call, and no array of calls."""
    kind: Any = list[_Written] if text.startswith("[") else _Written
    written = msgspec.json.decode(text, type=kind)
    return [_call_of(each) for each in (written if isinstance(written, list) else [written])]


def _call_of(written: _Written) -> ToolCallText:
    given = [raw for raw in (written.arguments, written.parameters) if isinstance(raw, msgspec.Raw)]
    arguments = bytes(given[0]).decode() if given else "{}"
    # Some models write them as a string that holds JSON.
    return ToolCallText(written.name, msgspec.json.decode(arguments, type=str) if arguments[0] == '"' else arguments)
