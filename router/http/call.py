"""From the bytes of a request to what the engine and the answer need: pure, so it may run in another thread."""

from __future__ import annotations

from dataclasses import dataclass

from pdserve.errors import InvalidRequest, ModelNotFound
from pdserve.request import MAX_SEED, SamplingParams
from router.http.body import decode_body
from router.http.schema import ChatRequest, CompletionRequest, parse_chat, parse_completion
from router.http.service import ServedModel

DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's
GREEDY_TEMPERATURE = 0.0


@dataclass(frozen=True, slots=True)
class Call:
    """A validated request: everything in it is within the model's limits."""

    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    stop_strings: tuple[str, ...]
    stream: bool
    include_usage: bool


def completion_call(body: bytes, model: ServedModel, drawn_seed: int) -> Call:
    """
    Args:
        drawn_seed: used when the client sent none.

    Raises:
        InvalidRequest, ModelNotFound: naming the field.
    """
    request = parse_completion(decode_body(body))
    _check_model(request.model, model)
    if isinstance(request.prompt, str):
        prompt = tuple(model.tokenizer.encode(request.prompt, add_special=True))
    else:
        _check_token_ids(request.prompt, model, "prompt")
        prompt = request.prompt
    if not prompt:
        raise InvalidRequest("'prompt' has no tokens.", param="prompt")
    left = _output_room(prompt, request.max_tokens, model, "prompt")
    return _call(request, prompt, request.max_tokens or min(DEFAULT_COMPLETION_TOKENS, left), model, drawn_seed)


def chat_call(body: bytes, model: ServedModel, drawn_seed: int) -> Call:
    """As `completion_call`; `max_tokens` defaults to what the prompt leaves of the context."""
    request = parse_chat(decode_body(body))
    _check_model(request.model, model)
    if model.chat_template is None:
        raise InvalidRequest(f"The model '{model.name}' has no chat template; use /v1/completions.", param="model")
    if request.max_tokens is not None and request.max_completion_tokens is not None:
        raise InvalidRequest("Only one of 'max_tokens' and 'max_completion_tokens' may be set.", param="max_tokens")
    text = model.chat_template.render([message.model_dump(exclude_none=True) for message in request.messages])
    prompt = tuple(model.tokenizer.encode(text, add_special=False))
    if not prompt:
        raise InvalidRequest("'messages' have no tokens.", param="messages")
    max_tokens = request.max_completion_tokens or request.max_tokens
    left = _output_room(prompt, max_tokens, model, "messages")
    return _call(request, prompt, max_tokens or left, model, drawn_seed)


def _check_model(name: str, model: ServedModel) -> None:
    if name != model.name:
        raise ModelNotFound(f"The model '{name[:64]}' does not exist.", param="model")


def _check_token_ids(token_ids: tuple[int, ...] | list[int], model: ServedModel, param: str) -> None:
    if token_ids and not (min(token_ids) >= 0 and max(token_ids) < model.vocab_size):
        raise InvalidRequest(
            f"Invalid value for '{param}': token ids must be from 0 to {model.vocab_size - 1}.", param=param
        )


def _output_room(prompt: tuple[int, ...], max_tokens: int | None, model: ServedModel, param: str) -> int:
    """Tokens of context that the prompt leaves; at least 1, and at least `max_tokens`."""
    wanted = max_tokens or 1
    if len(prompt) + wanted > model.max_model_len:
        raise InvalidRequest(
            f"This model's maximum context length is {model.max_model_len} tokens. However, you requested "
            f"{len(prompt) + wanted} tokens ({len(prompt)} in the {param}, {wanted} in the completion). "
            f"Please reduce the length of the {param} or completion.",
            param=param,
            code="context_length_exceeded",
        )
    return model.max_model_len - len(prompt)


def _call(
    request: CompletionRequest | ChatRequest,
    prompt: tuple[int, ...],
    max_tokens: int,
    model: ServedModel,
    drawn_seed: int,
) -> Call:
    if (request.min_tokens or 0) > max_tokens:
        raise InvalidRequest(f"'min_tokens' must be at most 'max_tokens' ({max_tokens}).", param="min_tokens")
    stop_token_ids = request.stop_token_ids or []
    _check_token_ids(stop_token_ids, model, "stop_token_ids")
    eos_token_ids = () if request.ignore_eos else model.eos_token_ids
    greedy = request.temperature == 0 or request.top_p == 0  # a nucleus of no mass is the likeliest token
    sampling = SamplingParams(
        max_tokens=max_tokens,
        seed=drawn_seed if request.seed is None else request.seed & MAX_SEED,
        temperature=GREEDY_TEMPERATURE if greedy else _given(request.temperature, 1.0),
        top_p=1.0 if greedy else _given(request.top_p, 1.0),
        top_k=max(request.top_k or 0, 0),
        min_tokens=request.min_tokens or 0,
        stop_token_ids=tuple(dict.fromkeys((*eos_token_ids, *stop_token_ids))),
    )
    options = request.stream_options
    return Call(
        prompt_token_ids=prompt,
        sampling=sampling,
        stop_strings=request.stop or (),
        stream=bool(request.stream),
        include_usage=bool(options is not None and options.include_usage),
    )


def _given(value: float | None, default: float) -> float:
    return default if value is None else value
