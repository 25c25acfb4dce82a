"""Grammars of answers that call functions, as Lark for llguidance: arguments hold to the functions' schemas.

A call that is forced is the whole answer. One that is free may stand behind text, in which everything goes until the
model writes what begins a call in its format; from there to the call's end the grammar leads. The state is a function
of the answer's tokens, so it comes back wherever a request goes on.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pdserve.request import Grammar
from router.text.tokenizer import Tokenizer
from router.text.tool_formats import HERMES, LLAMA3, MISTRAL, MISTRAL_NAMED, ToolFormat

# JSON as templates write it, and without blanks that a small model could go on with for ever.
_WRITTEN = {"x-guidance": {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}}
_ANY_ARGUMENTS = {"type": "object"}
TEXT = r"TEXT: /(.|\n)+/"
GAP = r"GAP: /[ \n]{1,2}/"
_LISTED = ' (", " one)*'
# What begins a call of Llama 3, which has no mark of its own: an object whose first key is the name.
_LLAMA3_HEAD = r'\s*\{\s*("type"\s*:\s*"function"\s*,\s*)?"name"'


@dataclass(frozen=True, slots=True)
class Callee:
    """A function that may be called. `arguments`: the JSON schema that they hold to; any object without one."""

    name: str
    arguments: Mapping[str, Any] | None = None


def forced_calls(tool_format: ToolFormat, callees: Sequence[Callee], tokenizer: Tokenizer, *, several: bool) -> Grammar:
    """The grammar of an answer that calls one of `callees`, or `several`, and says nothing else."""
    begin, end = _terminal(tool_format.begin, tokenizer), _terminal(tool_format.end, tokenizer)
    opening, closing = json.dumps(tool_format.opening), json.dumps(tool_format.closing)
    more = _LISTED if tool_format is MISTRAL and several else ""
    lines = [
        f"start: call{'+' if several and tool_format in (HERMES, MISTRAL_NAMED) else ''}",
        f"call: {begin} {opening} one{more} {closing} {end}",
        *_one(tool_format, callees, tokenizer),
    ]
    return Grammar("lark", "\n".join(lines))


def free_calls(
    tool_format: ToolFormat,
    callees: Sequence[Callee],
    tokenizer: Tokenizer,
    eos_token_ids: Sequence[int],
    *,
    several: bool,
) -> Grammar:
    """The grammar of an answer that may call one of `callees`, or `several`, anywhere in its text."""
    marks = {_special(tool_format.begin, tokenizer), _special(tool_format.mark, tokenizer)}
    others = sorted(tokenizer.special_tokens.keys() - marks - set(eos_token_ids))
    # Special tokens are no text to the grammar; all but those of the format may stand in it.
    other = f"<[{','.join(map(str, others))}]>" if others else ""
    rules = _llama3 if tool_format is LLAMA3 else _begun
    lines = rules(tool_format, tokenizer, other, several=several)
    return Grammar("lark", "\n".join([*lines, TEXT, GAP, *_one(tool_format, callees, tokenizer)]))


def calls_or_json(
    tool_format: ToolFormat, callees: Sequence[Callee], tokenizer: Tokenizer, schema: str, *, several: bool
) -> Grammar:
    """The grammar of an answer that is JSON after a schema, or calls. Not for Llama 3, whose calls are such JSON."""
    assert tool_format is not LLAMA3
    calls = _calls(tool_format, _terminal(tool_format.begin, tokenizer), tokenizer, several=several)
    content = json.dumps(json.loads(schema) | _WRITTEN)
    lines = [f"start: content | {calls}", f"content: %json {content}", GAP]
    return Grammar("lark", "\n".join([*lines, *_one(tool_format, callees, tokenizer)]))


def _begun(tool_format: ToolFormat, tokenizer: Tokenizer, other: str, *, several: bool) -> list[str]:
    """For calls that begin with a mark. `lead` is text before one, `last` text that none follows, `unmarked` the same
    without the mark."""
    again = several and tool_format is HERMES
    calls = _calls(tool_format, "begun", tokenizer, several=several and not again)
    start = f"(lead {calls})* last" if again else f"last | lead {calls}{' unmarked' if tool_format is HERMES else ''}"
    begin_id = _special(tool_format.begin, tokenizer)
    if begin_id is not None:
        lead = last = unmarked = f"(TEXT | {other})*" if other else "TEXT?"
        begun = f"begun: <[{begin_id}]>"
    else:
        lead, unmarked = (f"({text}? {other})*" if other else '""' for text in ("TEXT", "UNMARKED"))
        last, unmarked = f"{lead} TEXT?", f"{unmarked} UNMARKED?"
        # The shortest text that ends with the mark: as soon as it is there, nothing else can be meant.
        begun = f"begun[lazy]: /(.|\\n)*/ {json.dumps(tool_format.begin)}"
    return [
        f"start: {start}",
        f"lead: {lead}",
        f"last: {last}",
        f"unmarked: {unmarked}",
        begun,
        f"UNMARKED: /(.|\\n)+/ & ~/(.|\\n)*{_escaped(tool_format.begin)}(.|\\n)*/",
    ]


def _calls(tool_format: ToolFormat, begin: str, tokenizer: Tokenizer, *, several: bool) -> str:
    """One or `several` calls; `begin` stands before the first, "" if that has been read."""
    mark, end = _terminal(tool_format.begin, tokenizer), _terminal(tool_format.end, tokenizer)
    if tool_format is MISTRAL:
        return f'{begin} GAP? "[" one{_LISTED if several else ""} "]"'
    if tool_format is MISTRAL_NAMED:
        return f"{begin} one{f' ({mark} one)*' if several else ''}"
    return f"{begin} GAP? one GAP? {end}{f' (GAP? {mark} GAP? one GAP? {end})*' if several else ''}"


def _llama3(tool_format: ToolFormat, tokenizer: Tokenizer, other: str, *, several: bool) -> list[str]:
    """For calls that are the whole answer. `SAID` is text that does not begin as they do, and `HEAD` how they begin."""
    mark_id = _special(tool_format.mark, tokenizer)
    mark = "" if mark_id is None else f"<[{mark_id}]>?"
    head = _LLAMA3_HEAD if mark else f"({_escaped(tool_format.mark)})?{_LLAMA3_HEAD}"
    said = f"{other}* (SAID ({other} | TEXT)*)?" if other else "SAID?"
    more = ' ("; " one)*' if several else ""
    return [
        f"start: {said} | {mark} HEAD first{more}",
        f"SAID: /(.|\\n)+/ & ~/{head}(.|\\n)*/",
        f"HEAD: /{head}: /",
    ]


def _one(tool_format: ToolFormat, callees: Sequence[Callee], tokenizer: Tokenizer) -> list[str]:
    """Lines for `one` call, without the marks around it; of Llama 3 also `first`, which lacks its head."""
    named = _terminal(tool_format.named, tokenizer)
    lines = [f"one: {' | '.join(f'call_{i}' for i in range(len(callees)))}"]
    if tool_format is LLAMA3:
        lines.append(f"first: {' | '.join(f'first_{i}' for i in range(len(callees)))}")
    for i, callee in enumerate(callees):
        name = json.dumps(callee.name)
        behind = f'{name}, "{tool_format.arguments}": '
        if tool_format.named:
            lines.append(f"call_{i}: {name} {named} arguments_{i}")
        else:
            head = json.dumps('{"name": ' + behind)
            lines.append(f'call_{i}: {head} arguments_{i} "}}"')
        if tool_format is LLAMA3:
            lines.append(f'first_{i}: {json.dumps(behind)} arguments_{i} "}}"')
        lines.append(f"arguments_{i}: %json {json.dumps({**(callee.arguments or _ANY_ARGUMENTS), **_WRITTEN})}")
    return lines


def _special(text: str, tokenizer: Tokenizer) -> int | None:
    """The id of the special token that is written so."""
    ids = (token_id for token_id, content in tokenizer.special_tokens.items() if content == text)
    return next(ids, None) if text else None


def _terminal(text: str, tokenizer: Tokenizer) -> str:
    token_id = _special(text, tokenizer)
    return json.dumps(text) if token_id is None else f"<[{token_id}]>"


def _escaped(text: str) -> str:
    return re.escape(text).replace("/", r"\/")
