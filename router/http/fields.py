"""Fields of request bodies that take more than a type: each validator returns what the rest of the front works with."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, PlainValidator, WithJsonSchema
from pydantic_core import PydanticCustomError

from pdserve.protocol.codec import MAX_GRAMMAR_BYTES, MAX_LOGIT_BIAS, MAX_LOGPROBS
from router.http.body import deeper_than

MAX_STOP_STRINGS = 16
MAX_STOP_STRING_BYTES = 256
MAX_STOP_TOKEN_IDS = 64
MAX_PROMPTS = 64
MAX_METADATA_PAIRS = 16
MAX_METADATA_KEY_CHARS = 64
MAX_METADATA_VALUE_CHARS = 512
MAX_CHOICES_GUIDED = 256
MAX_SCHEMA_DEPTH = 16
MAX_BIAS = 100.0
MAX_COUNT = 2**31 - 1  # of tokens: above any context, so that messages can print it

Prompt = str | tuple[int, ...]


def _prompts(value: Any) -> tuple[Prompt, ...]:
    """A string, an array of token ids, or an array of either."""
    if isinstance(value, list) and value and isinstance(value[0], str | list):
        if len(value) > MAX_PROMPTS:
            raise PydanticCustomError("prompt", f"must be at most {MAX_PROMPTS} prompts")
        return tuple(map(_one_prompt, value))
    return (_one_prompt(value),)


def _one_prompt(value: Any) -> Prompt:
    if value in ("", []):
        raise PydanticCustomError("prompt", "must not be empty")
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(type(item) is int for item in value):
        return tuple(value)
    raise PydanticCustomError("prompt", "must be a string or an array of token ids")


def _stop(value: Any) -> tuple[str, ...]:
    strings = value if isinstance(value, list) else [value]
    if len(strings) > MAX_STOP_STRINGS:
        raise PydanticCustomError("stop", f"must be at most {MAX_STOP_STRINGS} strings")
    for string in strings:
        if not isinstance(string, str):
            raise PydanticCustomError("stop", "must be a string or an array of strings")
        if not 1 <= len(string.encode()) <= MAX_STOP_STRING_BYTES:
            raise PydanticCustomError("stop", f"each string must have 1 to {MAX_STOP_STRING_BYTES} bytes")
    return tuple(strings)


def _metadata(value: Any) -> dict[str, str]:
    """By hand, because pydantic would name a key, of any length, in the error."""
    if not isinstance(value, dict) or len(value) > MAX_METADATA_PAIRS:
        raise PydanticCustomError("metadata", f"must be an object of at most {MAX_METADATA_PAIRS} pairs")
    if any(len(key) > MAX_METADATA_KEY_CHARS for key in value):
        raise PydanticCustomError("metadata", f"keys must have at most {MAX_METADATA_KEY_CHARS} characters")
    if any(not isinstance(item, str) or len(item) > MAX_METADATA_VALUE_CHARS for item in value.values()):
        raise PydanticCustomError(
            "metadata", f"values must be strings of at most {MAX_METADATA_VALUE_CHARS} characters"
        )
    return value


def _logit_bias(value: Any) -> tuple[tuple[int, float], ...]:
    """JSON has strings as keys; they hold token ids."""
    if not isinstance(value, dict) or len(value) > MAX_LOGIT_BIAS:
        raise PydanticCustomError("logit_bias", f"must be an object of at most {MAX_LOGIT_BIAS} token ids")
    pairs = []
    for key, bias in value.items():
        if not (key.isascii() and key.isdigit() and len(key) <= 10):
            raise PydanticCustomError("logit_bias", "keys must be token ids")
        if isinstance(bias, bool) or not isinstance(bias, int | float) or not -MAX_BIAS <= bias <= MAX_BIAS:
            raise PydanticCustomError("logit_bias", f"values must be numbers from {-MAX_BIAS:g} to {MAX_BIAS:g}")
        pairs.append((int(key), float(bias)))
    return tuple(pairs)


def _schema(value: Any) -> str:
    """A JSON schema as text."""
    if not isinstance(value, dict):
        raise PydanticCustomError("schema", "must be a JSON schema: an object")
    if deeper_than(value, MAX_SCHEMA_DEPTH):
        raise PydanticCustomError("schema", f"must not be nested deeper than {MAX_SCHEMA_DEPTH} levels")
    return _grammar(json.dumps(value, separators=(",", ":")))


def _grammar(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise PydanticCustomError("grammar", "must be a string that is not empty")
    if len(value.encode()) > MAX_GRAMMAR_BYTES:
        raise PydanticCustomError("grammar", f"must have at most {MAX_GRAMMAR_BYTES} bytes")
    return value


def _choices(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_CHOICES_GUIDED:
        raise PydanticCustomError("choice", f"must be an array of 1 to {MAX_CHOICES_GUIDED} strings")
    if any(not isinstance(item, str) or not item for item in value):
        raise PydanticCustomError("choice", "must hold strings that are not empty")
    _grammar(json.dumps(value))
    return tuple(value)


def _role(value: Any) -> Any:
    if value == "function":
        raise PydanticCustomError("role", "the role 'function' is of an older API; use 'tool'")
    return "system" if value == "developer" else value  # the newer name of the same thing


def _content(value: Any) -> str | None:
    """A string, or text parts, which join as lines."""
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise PydanticCustomError("content", "must be a string or an array of text parts")
    for part in value:
        if not isinstance(part, dict) or "type" not in part:
            raise PydanticCustomError("content", "each part must be an object with a 'type'")
        if part["type"] != "text":
            raise PydanticCustomError("content", "parts other than 'text' are not supported: the models read text")
        if part.keys() != {"type", "text"} or not isinstance(part["text"], str):
            raise PydanticCustomError("content", "a text part must have 'type' and a string 'text', nothing else")
    return "\n".join(part["text"] for part in value)


_TOKEN_IDS = {"type": "array", "items": {"type": "integer"}, "minItems": 1}
_TEXT = {"type": "string", "minLength": 1}


def _documented(validator: Callable[[Any], Any], schema: dict[str, Any]) -> tuple[PlainValidator, WithJsonSchema]:
    return PlainValidator(validator), WithJsonSchema(schema)


_PROMPTS = {"anyOf": [_TEXT, _TOKEN_IDS, {"type": "array", "items": {"anyOf": [_TEXT, _TOKEN_IDS]}, "minItems": 1}]}
_STOP_STRING = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_STRING_BYTES}
_STOP = {"anyOf": [_STOP_STRING, {"type": "array", "items": _STOP_STRING, "maxItems": MAX_STOP_STRINGS}]}
_METADATA = {
    "type": "object",
    "additionalProperties": {"type": "string", "maxLength": MAX_METADATA_VALUE_CHARS},
    "maxProperties": MAX_METADATA_PAIRS,
}
_LOGIT_BIAS = {
    "type": "object",
    "propertyNames": {"pattern": "^[0-9]{1,10}$"},
    "additionalProperties": {"type": "number", "minimum": -MAX_BIAS, "maximum": MAX_BIAS},
    "maxProperties": MAX_LOGIT_BIAS,
}
_GRAMMAR_TEXT = {"type": "string", "minLength": 1, "maxLength": MAX_GRAMMAR_BYTES}
_CHOICES = {"type": "array", "items": _TEXT, "minItems": 1, "maxItems": MAX_CHOICES_GUIDED}
_PART = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
    "required": ["type", "text"],
    "additionalProperties": False,
}
_CONTENT = {"anyOf": [{"type": "string"}, {"type": "array", "items": _PART}, {"type": "null"}]}

Prompts = Annotated[tuple[Prompt, ...], *_documented(_prompts, _PROMPTS)]
Stop = Annotated[tuple[str, ...], *_documented(_stop, _STOP)]
Metadata = Annotated[dict[str, str], *_documented(_metadata, _METADATA)]
LogitBias = Annotated[tuple[tuple[int, float], ...], *_documented(_logit_bias, _LOGIT_BIAS)]
JsonSchema = Annotated[str, *_documented(_schema, {"type": "object"})]
GrammarText = Annotated[str, *_documented(_grammar, _GRAMMAR_TEXT)]
GuidedChoices = Annotated[tuple[str, ...], *_documented(_choices, _CHOICES)]
Content = Annotated[str | None, *_documented(_content, _CONTENT)]
before_role = BeforeValidator(_role)
Tokens = Annotated[int, Field(ge=1, le=MAX_COUNT)]
TopLogprobs = Annotated[int, Field(ge=0, le=MAX_LOGPROBS)]
Penalty = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
