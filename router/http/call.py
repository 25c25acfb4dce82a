"""From the bytes of a request to what the engine and the answer need: pure, so it may run in another thread."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pdserve.errors import InvalidRequest, ModelNotFound
from pdserve.request import MAX_SEED, SamplingParams
from router.http.body import decode_body
from router.http.conversation import Tooling, prompt_text, tooling_of
from router.http.schema import ChatRequest, CompletionRequest, parse_chat, parse_completion
from router.http.service import ServedModel
from router.http.structured import RequestedGrammar, requested_grammar

DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's
GREEDY_TEMPERATURE = 0.0
MAX_CHOICES = 64  # of all prompts of a request together


@dataclass(frozen=True, slots=True)
class Prompt:
    token_ids: tuple[int, ...]
    text: str | None = None  # to be repeated before the answer


@dataclass(frozen=True, slots=True)
class Call:
    """A validated request: everything in it is within the model's limits.

    Attributes:
        n: choices that are answered with, for each prompt.
        best_of: choices that are generated for each; the `n` likeliest are kept.
        continuous_usage: with each chunk of a stream, not the last alone.
        tells_logprobs: with the answer's tokens. Log probabilities may be computed without being told.
        tells_prompt_logprobs: in vLLM's shape, beside the choice.
        echo_only: the answer is the prompt alone.
        priority: as of `router.wishes.Wishes`.
        cache_salt: cached blocks are shared with requests of the same tenant and salt only.
        writes_special: special tokens stand in the text as they are written.
        repeated: of the request, in the response (of the Responses API).
        grammar_param: the parameter that the grammar, if there is one, comes from.
    """

    prompts: tuple[Prompt, ...]
    sampling: SamplingParams
    stop_strings: tuple[str, ...]
    stream: bool
    include_usage: bool
    continuous_usage: bool = False
    n: int = 1
    best_of: int = 1
    tells_logprobs: bool = False
    tells_prompt_logprobs: bool = False
    echo_only: bool = False
    return_token_ids: bool = False
    keeps_stop_string: bool = False
    writes_special: bool = False
    tooling: Tooling | None = None
    priority: int = 0
    cache_salt: str | None = None
    grammar_param: str = ""
    repeated: Mapping[str, Any] = field(default_factory=dict)

    @property
    def prompt_tokens(self) -> int:
        return sum([len(prompt.token_ids) for prompt in self.prompts])


def completion_call(body: bytes, model: ServedModel, drawn_seed: int) -> Call:
    """
    Args:
        drawn_seed: used when the client sent none.

    Raises:
        InvalidRequest, ModelNotFound: naming the field.
    """
    request = parse_completion(decode_body(body))
    check_model(request.model, model)
    prompts = tuple(_completion_prompt(prompt, request, model) for prompt in request.prompt)
    echo_only = request.max_tokens == 0
    if echo_only and not request.echo:
        raise InvalidRequest("'max_tokens' may be 0 only with 'echo'.", param="max_tokens")
    max_tokens = 1 if echo_only else request.max_tokens
    left = _output_room(prompts, max_tokens, model, "prompt")
    n = request.n or 1
    best_of = n if request.best_of is None else request.best_of
    if best_of < n:
        raise InvalidRequest("'best_of' must be at least 'n'.", param="best_of")
    if best_of > n and request.stream:
        raise InvalidRequest("'best_of' above 'n' cannot be streamed: the best are known at the end.", param="best_of")
    if best_of * len(prompts) > MAX_CHOICES:
        raise InvalidRequest(f"A request may have {MAX_CHOICES} choices, of all prompts together.", param="prompt")
    if request.echo and request.prompt_logprobs is not None:
        raise InvalidRequest("With 'echo', 'logprobs' tells of the prompt too.", param="prompt_logprobs")
    return _call(
        request,
        prompts,
        max_tokens or min(DEFAULT_COMPLETION_TOKENS, left),
        model,
        drawn_seed,
        best_of=best_of,
        echo_only=echo_only,
        tells_logprobs=request.logprobs is not None,
        logprobs=0 if request.logprobs is None and best_of > n else request.logprobs,
        prompt_logprobs=request.logprobs if request.echo else request.prompt_logprobs,
    )


def chat_call(body: bytes, model: ServedModel, drawn_seed: int) -> Call:
    """As `completion_call`; `max_tokens` defaults to what the prompt leaves of the context."""
    request = parse_chat(decode_body(body))
    check_model(request.model, model)
    if model.chat_template is None:
        raise InvalidRequest(f"The model '{model.name}' has no chat template; use /v1/completions.", param="model")
    if request.max_tokens is not None and request.max_completion_tokens is not None:
        raise InvalidRequest("Only one of 'max_tokens' and 'max_completion_tokens' may be set.", param="max_tokens")
    if request.top_logprobs and not request.logprobs:
        raise InvalidRequest("'top_logprobs' is only allowed when 'logprobs' is true.", param="top_logprobs")
    tooling = tooling_of(request, model)
    text = prompt_text(request, model.chat_template, tooling)
    prompts = (Prompt(tuple(model.tokenizer.encode(text, add_special=False))),)
    if not prompts[0].token_ids:
        raise InvalidRequest("'messages' have no tokens.", param="messages")
    max_tokens = request.max_completion_tokens or request.max_tokens
    left = _output_room(prompts, max_tokens, model, "messages")
    call = _call(
        request,
        prompts,
        max_tokens or left,
        model,
        drawn_seed,
        best_of=request.n or 1,
        tells_logprobs=bool(request.logprobs),
        tooling=tooling,
        logprobs=(request.top_logprobs or 0) if request.logprobs else None,
        prompt_logprobs=request.prompt_logprobs,
    )
    if tooling is not None and tooling.grammar is not None:
        if call.sampling.grammar is not None and tooling.forced:
            raise InvalidRequest("A forced tool call has a format of its own.", param="tool_choice")
        return replace(call, sampling=replace(call.sampling, grammar=tooling.grammar), grammar_param="tools")
    return call


def _completion_prompt(prompt: str | tuple[int, ...], request: CompletionRequest, model: ServedModel) -> Prompt:
    if isinstance(prompt, str):
        add_special = request.add_special_tokens is not False
        token_ids = tuple(model.tokenizer.encode(prompt, add_special=add_special))
        text = prompt
    else:
        check_token_ids(prompt, model, "prompt")
        token_ids = prompt
        text = model.tokenizer.decode(prompt) if request.echo else ""
    if not token_ids:
        raise InvalidRequest("'prompt' has no tokens.", param="prompt")
    return Prompt(token_ids, text if request.echo else None)


def check_model(name: str, model: ServedModel) -> None:
    """Raises ModelNotFound."""
    if name != model.name:
        raise ModelNotFound(f"The model '{name[:64]}' does not exist.", param="model")


def check_token_ids(token_ids: Sequence[int], model: ServedModel, param: str) -> None:
    """Raises InvalidRequest."""
    if token_ids and not (min(token_ids) >= 0 and max(token_ids) < model.vocab_size):
        raise InvalidRequest(
            f"Invalid value for '{param}': token ids must be from 0 to {model.vocab_size - 1}.", param=param
        )


def _output_room(prompts: Sequence[Prompt], max_tokens: int | None, model: ServedModel, param: str) -> int:
    """Tokens of context that the longest prompt leaves; at least 1, and at least `max_tokens`."""
    longest, wanted = max(len(prompt.token_ids) for prompt in prompts), max_tokens or 1
    if longest + wanted > model.max_model_len:
        raise InvalidRequest(
            f"This model's maximum context length is {model.max_model_len} tokens. However, you requested "
            f"{longest + wanted} tokens ({longest} in the {param}, {wanted} in the completion). "
            f"Please reduce the length of the {param} or completion.",
            param=param,
            code="context_length_exceeded",
        )
    return model.max_model_len - longest


def _call(
    request: CompletionRequest | ChatRequest,
    prompts: tuple[Prompt, ...],
    max_tokens: int,
    model: ServedModel,
    drawn_seed: int,
    *,
    best_of: int,
    logprobs: int | None,
    prompt_logprobs: int | None,
    tells_logprobs: bool,
    echo_only: bool = False,
    tooling: Tooling | None = None,
) -> Call:
    """What both endpoints share. `logprobs` and `prompt_logprobs` are computed, whether or not they are told."""
    if (request.min_tokens or 0) > max_tokens:
        raise InvalidRequest(f"'min_tokens' must be at most 'max_tokens' ({max_tokens}).", param="min_tokens")
    more_stops, logit_bias = request.stop_token_ids or [], request.logit_bias or ()
    check_token_ids(more_stops, model, "stop_token_ids")
    check_token_ids([token_id for token_id, _ in logit_bias], model, "logit_bias")
    if request.prompt_logprobs is not None and request.stream:
        raise InvalidRequest("'prompt_logprobs' cannot be streamed.", param="prompt_logprobs")
    options, asked = request.stream_options, requested_grammar(request)
    stop_token_ids = (*_eos(request, model), *more_stops)
    return Call(
        prompts=prompts,
        sampling=_sampling(request, max_tokens, stop_token_ids, drawn_seed, asked, logprobs, prompt_logprobs),
        stop_strings=request.stop or (),
        stream=bool(request.stream),
        include_usage=bool(options is not None and options.include_usage),
        continuous_usage=bool(options is not None and options.include_usage and options.continuous_usage_stats),
        n=request.n or 1,
        best_of=best_of,
        tells_logprobs=tells_logprobs,
        tells_prompt_logprobs=request.prompt_logprobs is not None,
        echo_only=echo_only,
        return_token_ids=bool(request.return_token_ids),
        keeps_stop_string=bool(request.include_stop_str_in_output),
        writes_special=request.skip_special_tokens is False,
        tooling=tooling,
        priority=request.priority or 0,
        cache_salt=request.cache_salt,
        grammar_param="" if asked is None else asked.param,
    )


def _eos(request: CompletionRequest | ChatRequest, model: ServedModel) -> tuple[int, ...]:
    return () if request.ignore_eos else model.eos_token_ids


def _sampling(
    request: CompletionRequest | ChatRequest,
    max_tokens: int,
    stop_token_ids: tuple[int, ...],
    drawn_seed: int,
    asked: RequestedGrammar | None,
    logprobs: int | None,
    prompt_logprobs: int | None,
) -> SamplingParams:
    greedy = request.temperature == 0 or request.top_p == 0  # a nucleus of no mass is the likeliest token
    return SamplingParams(
        max_tokens=max_tokens,
        seed=drawn_seed if request.seed is None else request.seed & MAX_SEED,
        temperature=GREEDY_TEMPERATURE if greedy else _given(request.temperature, 1.0),
        top_p=1.0 if greedy else _given(request.top_p, 1.0),
        top_k=max(request.top_k or 0, 0),
        min_tokens=request.min_tokens or 0,
        stop_token_ids=tuple(dict.fromkeys(stop_token_ids)),
        min_p=request.min_p or 0.0,
        presence_penalty=request.presence_penalty or 0.0,
        frequency_penalty=request.frequency_penalty or 0.0,
        repetition_penalty=_given(request.repetition_penalty, 1.0),
        logit_bias=request.logit_bias or (),
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        grammar=None if asked is None else asked.grammar,
    )


def _given(value: float | None, default: float) -> float:
    return default if value is None else value
