"""Which grammar a request asks for, in whichever of the four spellings."""

from __future__ import annotations

import json
from dataclasses import dataclass

from pdserve.errors import InvalidRequest
from pdserve.request import Grammar, GrammarKind
from router.http.schema import ChatRequest, CompletionRequest, ResponseFormat, StructuredOutputs

_ANY_OBJECT = '{"type":"object"}'


@dataclass(frozen=True, slots=True)
class RequestedGrammar:
    param: str  # that asks for it
    grammar: Grammar


def requested_grammar(request: CompletionRequest | ChatRequest) -> RequestedGrammar | None:
    """Raises InvalidRequest when more than one is asked for."""
    outputs = request.structured_outputs or StructuredOutputs()
    texts: tuple[tuple[str, GrammarKind, str | None], ...] = (
        ("structured_outputs.json", "json_schema", outputs.json_schema),
        ("guided_json", "json_schema", request.guided_json),
        ("structured_outputs.regex", "regex", outputs.regex),
        ("guided_regex", "regex", request.guided_regex),
        ("structured_outputs.choice", "lark", _one_of(outputs.choice)),
        ("guided_choice", "lark", _one_of(request.guided_choice)),
        ("structured_outputs.grammar", "lark", outputs.grammar),
        ("guided_grammar", "lark", request.guided_grammar),
    )
    asked = [
        ("response_format", _of_format(request.response_format)),
        *((name, Grammar(kind, text)) for name, kind, text in texts if text is not None),
    ]
    given = [RequestedGrammar(name, grammar) for name, grammar in asked if grammar is not None]
    if len(given) > 1:
        raise InvalidRequest("An output can follow one format or grammar, not several.", param=given[1].param)
    return given[0] if given else None


def _of_format(response_format: ResponseFormat | None) -> Grammar | None:
    if response_format is None or response_format.type == "text":
        return None
    if response_format.type == "json_object":
        return Grammar("json_schema", _ANY_OBJECT)
    if response_format.json_schema is None:
        raise InvalidRequest("'response_format.json_schema' is required.", param="response_format.json_schema")
    return Grammar("json_schema", response_format.json_schema.json_schema)


def _one_of(choices: tuple[str, ...] | None) -> str | None:
    """As Lark, whose strings are written as JSON's are."""
    return None if choices is None else f"start: {' | '.join(map(json.dumps, choices))}"
