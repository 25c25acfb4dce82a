"""Which grammar a request asks for, in whichever of the four spellings."""

from __future__ import annotations

import json

from pdserve.errors import InvalidRequest
from pdserve.request import Grammar
from router.http.schema import ChatRequest, CompletionRequest, ResponseFormat, StructuredOutputs

_ANY_OBJECT = '{"type":"object"}'


def requested_grammar(request: CompletionRequest | ChatRequest) -> Grammar | None:
    """Raises InvalidRequest when more than one is asked for."""
    outputs = request.structured_outputs or StructuredOutputs()
    asked = [
        ("response_format", _of_format(request.response_format)),
        *((name, _json(text)) for name, text in (("json", outputs.json_schema), ("guided_json", request.guided_json))),
        *((name, _regex(text)) for name, text in (("regex", outputs.regex), ("guided_regex", request.guided_regex))),
        *((name, _choice(all)) for name, all in (("choice", outputs.choice), ("guided_choice", request.guided_choice))),
        *((name, _lark(text)) for name, text in (("grammar", outputs.grammar), ("grammar", request.guided_grammar))),
    ]
    given = [(name, grammar) for name, grammar in asked if grammar is not None]
    if len(given) > 1:
        raise InvalidRequest("An output can follow one format or grammar, not several.", param=given[1][0])
    return given[0][1] if given else None


def _of_format(response_format: ResponseFormat | None) -> Grammar | None:
    if response_format is None or response_format.type == "text":
        return None
    if response_format.type == "json_object":
        return Grammar("json_schema", _ANY_OBJECT)
    if response_format.json_schema is None:
        raise InvalidRequest("'response_format.json_schema' is required.", param="response_format.json_schema")
    return Grammar("json_schema", response_format.json_schema.json_schema)


def _json(schema: str | None) -> Grammar | None:
    return None if schema is None else Grammar("json_schema", schema)


def _regex(regex: str | None) -> Grammar | None:
    return None if regex is None else Grammar("regex", regex)


def _choice(choices: tuple[str, ...] | None) -> Grammar | None:
    return None if choices is None else Grammar("lark", f"start: {' | '.join(map(json.dumps, choices))}")


def _lark(text: str | None) -> Grammar | None:
    return None if text is None else Grammar("lark", text)
