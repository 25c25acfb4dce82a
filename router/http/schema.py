"""Request bodies of the two generating endpoints: types and ranges that hold whatever the model is.

Strict: no coercion from strings or from floats to integers, and a name that the API does not have is refused, as OpenAI
does. null means absent everywhere.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, ValidationError
from pydantic_core import PydanticCustomError

from pdserve.errors import InvalidRequest
from router.http import unsupported

MAX_STOP_STRINGS = 16
MAX_STOP_STRING_BYTES = 256
MAX_STOP_TOKEN_IDS = 64
MAX_MESSAGES = 1024
MAX_METADATA_PAIRS = 16
MAX_METADATA_KEY_CHARS = 64
MAX_METADATA_VALUE_CHARS = 512
_MAX_COUNT = 2**31 - 1  # of tokens: above any context, so that messages can print it


def _prompt(value: Any) -> str | tuple[int, ...]:
    """A string or token ids; or an array with one of these, which is how some clients send every prompt."""
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str | list):
        value = value[0]
    if value in ("", []):
        raise PydanticCustomError("prompt", "must not be empty")
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        if all(type(item) is int for item in value):
            return tuple(value)
        if all(isinstance(item, str | list) for item in value):
            raise PydanticCustomError("prompt", "batches of prompts are not supported yet; send one request a prompt")
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


def _role(value: Any) -> Any:
    if value in ("tool", "function"):
        raise PydanticCustomError("role", "the roles 'tool' and 'function' are not supported yet")
    return "system" if value == "developer" else value  # the newer name of the same thing


def _content(value: Any) -> str:
    """A string, or text parts, which join as lines."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise PydanticCustomError("content", "must be a string or an array of text parts")
    for part in value:
        if not isinstance(part, dict) or "type" not in part:
            raise PydanticCustomError("content", "each part must be an object with a 'type'")
        if part["type"] != "text":
            raise PydanticCustomError("content", "parts other than 'text' are not supported yet")
        if part.keys() != {"type", "text"} or not isinstance(part["text"], str):
            raise PydanticCustomError("content", "a text part must have 'type' and a string 'text', nothing else")
    return "\n".join(part["text"] for part in value)


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class StreamOptions(_Strict):
    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class _Generating(_Strict):
    model: str
    max_tokens: Annotated[int, Field(ge=1, le=_MAX_COUNT)] | None = None
    min_tokens: Annotated[int, Field(ge=0, le=_MAX_COUNT)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=_MAX_COUNT)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: Annotated[tuple[str, ...], PlainValidator(_stop)] | None = None
    stop_token_ids: Annotated[list[int], Field(max_length=MAX_STOP_TOKEN_IDS)] | None = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # Who the end user is, and the client's own notes: nothing here depends on them.
    user: str | None = None
    safety_identifier: str | None = None
    metadata: Annotated[dict[str, str], PlainValidator(_metadata)] | None = None


class CompletionRequest(_Generating):
    """Body of /v1/completions."""

    prompt: Annotated[str | tuple[int, ...], PlainValidator(_prompt)]


class Message(_Strict):
    role: Annotated[Literal["system", "user", "assistant"], BeforeValidator(_role)]
    content: Annotated[str, PlainValidator(_content)]
    name: str | None = None


class ChatRequest(_Generating):
    """Body of /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=_MAX_COUNT)] | None = None


def parse_completion(body: dict[str, Any]) -> CompletionRequest:
    """Raises InvalidRequest, naming the field."""
    return _parse(CompletionRequest, unsupported.drop_neutral(body, unsupported.COMPLETION))


def parse_chat(body: dict[str, Any]) -> ChatRequest:
    """Raises InvalidRequest, naming the field."""
    body = unsupported.drop_neutral(body, unsupported.CHAT)
    messages = body.get("messages")
    if isinstance(messages, list) and len(messages) <= MAX_MESSAGES:
        body["messages"] = [
            unsupported.drop_neutral(message, unsupported.MESSAGE, f"messages[{index}].")
            if isinstance(message, dict)
            else message
            for index, message in enumerate(messages)
        ]
    return _parse(ChatRequest, body)


_Body = TypeVar("_Body", bound=_Generating)


def _parse(kind: type[_Body], body: dict[str, Any]) -> _Body:
    try:
        request = kind.model_validate(body)
    except ValidationError as error:
        raise _invalid(error) from error
    if request.stream_options is not None and not request.stream:
        raise InvalidRequest("'stream_options' is only allowed when 'stream' is true.", param="stream_options")
    return request


def _invalid(error: ValidationError) -> InvalidRequest:
    """The first fault, as one sentence. pydantic's messages say what was expected and never what was sent."""
    fault = error.errors(include_url=False, include_input=False, include_context=False)[0]
    param = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in fault["loc"]).lstrip(".")
    match fault["type"]:
        case "missing":
            return InvalidRequest(f"'{param}' is required.", param=param, code="missing_required_parameter")
        case "extra_forbidden":
            shown = param[:64]
            return InvalidRequest(
                f"Unrecognized request argument supplied: {shown}", param=shown, code="unknown_parameter"
            )
        case "model_type":
            return InvalidRequest(f"Invalid value for '{param}': must be an object.", param=param)
        case _:
            message = fault["msg"]
            return InvalidRequest(f"Invalid value for '{param}': {message[0].lower()}{message[1:]}.", param=param)
