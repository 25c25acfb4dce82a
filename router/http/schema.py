"""Request bodies of the generating endpoints: types and ranges that hold whatever the model is.

Strict: no coercion from strings or from floats to integers, and a name that the API does not have is refused, as OpenAI
does. null means absent everywhere.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from pdserve.errors import InvalidRequest
from router.http import unsupported
from router.http.fields import (
    MAX_COUNT,
    MAX_STOP_TOKEN_IDS,
    Content,
    Fraction,
    GrammarText,
    GuidedChoices,
    JsonSchema,
    LogitBias,
    Metadata,
    Penalty,
    Prompts,
    Stop,
    Tokens,
    TopLogprobs,
    before_role,
)

MAX_MESSAGES = 1024
MAX_TOOLS = 128
MAX_N = 8
MAX_PRIORITY = 100
MAX_CACHE_SALT_CHARS = 256
NAME = r"^[a-zA-Z0-9_-]{1,64}$"


class Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class StreamOptions(Strict):
    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None
    continuous_usage_stats: bool | None = None


class NamedSchema(Strict):
    name: Annotated[str, Field(pattern=NAME)]
    json_schema: Annotated[JsonSchema, Field(alias="schema")]
    description: str | None = None
    strict: bool | None = None  # what is generated follows the schema in either case


class ResponseFormat(Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None


class StructuredOutputs(Strict):
    """vLLM's extension: one of these."""

    json_schema: Annotated[JsonSchema | None, Field(alias="json")] = None
    regex: GrammarText | None = None
    choice: GuidedChoices | None = None
    grammar: GrammarText | None = None  # Lark as llguidance reads it


class Generating(Strict):
    model: str
    max_tokens: Tokens | None = None
    min_tokens: Annotated[int, Field(ge=0, le=MAX_COUNT)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_N)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Fraction | None = None
    top_k: Annotated[int, Field(ge=-1, le=MAX_COUNT)] | None = None
    min_p: Fraction | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10, allow_inf_nan=False)] | None = None
    logit_bias: LogitBias | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: Stop | None = None
    stop_token_ids: Annotated[list[int], Field(max_length=MAX_STOP_TOKEN_IDS)] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    prompt_logprobs: TopLogprobs | None = None
    return_token_ids: bool | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=MAX_CACHE_SALT_CHARS)] | None = None
    priority: Annotated[int, Field(ge=-MAX_PRIORITY, le=MAX_PRIORITY)] | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: JsonSchema | None = None
    guided_regex: GrammarText | None = None
    guided_choice: GuidedChoices | None = None
    guided_grammar: GrammarText | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # Who the end user is, and the client's own notes: nothing here depends on them.
    user: str | None = None
    safety_identifier: str | None = None
    metadata: Metadata | None = None


class CompletionRequest(Generating):
    """Body of /v1/completions."""

    prompt: Prompts
    max_tokens: Annotated[int, Field(ge=0, le=MAX_COUNT)] | None = None  # 0 only with `echo`
    best_of: Annotated[int, Field(ge=1, le=MAX_N)] | None = None
    echo: bool | None = None
    logprobs: TopLogprobs | None = None
    add_special_tokens: bool | None = None


class FunctionCall(Strict):
    name: Annotated[str, Field(pattern=NAME)]
    arguments: str


class ToolCall(Strict):
    id: str
    type: Literal["function"]
    function: FunctionCall


class Message(Strict):
    role: Annotated[Literal["system", "user", "assistant", "tool"], before_role]
    content: Content = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None


class Function(Strict):
    name: Annotated[str, Field(pattern=NAME)]
    description: str | None = None
    parameters: JsonSchema | None = None
    strict: bool | None = None


class Tool(Strict):
    type: Literal["function"]
    function: Function


class FunctionName(Strict):
    name: str


class ToolChoice(Strict):
    type: Literal["function"]
    function: FunctionName


class ChatRequest(Generating):
    """Body of /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Tokens | None = None
    logprobs: bool | None = None
    top_logprobs: TopLogprobs | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | None = None


def parse_completion(body: dict[str, Any]) -> CompletionRequest:
    """Raises InvalidRequest, naming the field."""
    request = parse(CompletionRequest, body, unsupported.COMPLETION)
    _check_stream_options(request)
    return request


def parse_chat(body: dict[str, Any]) -> ChatRequest:
    """Raises InvalidRequest, naming the field."""
    messages = body.get("messages")
    if isinstance(messages, list) and len(messages) <= MAX_MESSAGES:
        kept = [
            unsupported.drop_neutral(message, unsupported.MESSAGE, f"messages[{index}].")
            if isinstance(message, dict)
            else message
            for index, message in enumerate(messages)
        ]
        body = body | {"messages": kept}
    request = parse(ChatRequest, body, unsupported.CHAT)
    _check_stream_options(request)
    for index, message in enumerate(request.messages):
        _check_message(message, f"messages[{index}]")
    return request


def _check_message(message: Message, where: str) -> None:
    """Raises InvalidRequest for fields that do not go together."""
    calls = message.role == "assistant" and message.tool_calls
    if "content" not in message.model_fields_set and not calls:
        param = f"{where}.content"
        raise InvalidRequest(f"'{param}' is required.", param=param, code="missing_required_parameter")
    if message.content is None and not calls:
        raise _invalid_value(f"{where}.content", "must be a string or an array of text parts")
    if message.tool_calls and message.role != "assistant":
        raise _invalid_value(f"{where}.tool_calls", "only messages of the role 'assistant' have calls")
    if (message.role == "tool") != (message.tool_call_id is not None):
        raise _invalid_value(f"{where}.tool_call_id", "messages of the role 'tool' have it, and no others")


_Body = TypeVar("_Body", bound=Strict)


def parse(kind: type[_Body], body: dict[str, Any], neutral: unsupported.Neutral = MappingProxyType({})) -> _Body:
    """`neutral`: parameters that are not there, with the values at which they may be. Raises InvalidRequest."""
    try:
        return kind.model_validate(body := unsupported.drop_neutral(body, neutral))
    except ValidationError as error:
        raise _invalid(error, body) from error


def _check_stream_options(request: Generating) -> None:
    if request.stream_options is not None and not request.stream:
        raise InvalidRequest("'stream_options' is only allowed when 'stream' is true.", param="stream_options")


def _invalid_value(param: str, must: str) -> InvalidRequest:
    return InvalidRequest(f"Invalid value for '{param}': {must}.", param=param)


def _invalid(error: ValidationError, body: dict[str, Any]) -> InvalidRequest:
    """The first fault, as one sentence. pydantic's messages say what was expected and never what was sent."""
    faults = error.errors(include_url=False, include_input=False, include_context=False)
    fault, path = faults[0], _path(faults[0], body)
    if len(path) < len(fault["loc"]):  # of a union: the form that the value comes nearest to
        found = [(each, each_path) for each in faults if (each_path := _path(each, body))[: len(path)] == path]
        fault, path = max(found, key=lambda pair: (len(pair[1]), not pair[0]["type"].endswith("_type")))
    param = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path).lstrip(".")
    match fault["type"]:
        case "missing":
            return InvalidRequest(f"'{param}' is required.", param=param, code="missing_required_parameter")
        case "extra_forbidden":
            shown = param[:64]
            return InvalidRequest(
                f"Unrecognized request argument supplied: {shown}", param=shown, code="unknown_parameter"
            )
        case "model_type":
            return _invalid_value(param, "must be an object")
        case _:
            message = fault["msg"]
            return _invalid_value(param, message[0].lower() + message[1:])


def _path(fault: ErrorDetails, value: Any) -> tuple[int | str, ...]:
    """Where it is, as the client knows it: without the names of a union's forms, which pydantic puts between."""
    path: list[int | str] = []
    for step in fault["loc"]:
        try:
            value = value[step]
        except (TypeError, LookupError):  # the name of a form, or of what is missing
            continue
        path.append(step)
    return (*path, fault["loc"][-1]) if fault["type"] == "missing" else tuple(path)
