"""Between protobuf messages and our own types. What a peer sends is checked here, before anything acts on it."""

from __future__ import annotations

import math

from kvstore.keys import KEY_BYTES
from pdserve.errors import InvalidRequest
from pdserve.protocol import worker_pb2 as pb
from pdserve.request import MAX_SEED, FinishReason, Grammar, GrammarKind, SamplingParams, TokenLogprobs
from pdserve.tenants import MAX_NAME_BYTES

MAX_LOGPROBS = 20  # alternatives a token
MAX_LOGIT_BIAS = 1024  # tokens
MAX_GRAMMAR_BYTES = 64 * 2**10
_GRAMMAR_KINDS: tuple[GrammarKind, ...] = ("json_schema", "regex", "lark")

_FINISH_TO_PROTO = {
    None: pb.RUNNING,
    FinishReason.STOP: pb.STOP,
    FinishReason.LENGTH: pb.LENGTH,
    FinishReason.ABORT: pb.ABORT,
    FinishReason.ERROR: pb.ERROR,
}
_FINISH_FROM_PROTO = {value: key for key, value in _FINISH_TO_PROTO.items()}


def finish_to_proto(reason: FinishReason | None) -> pb.Finish:
    return _FINISH_TO_PROTO[reason]


def finish_from_proto(finish: pb.Finish) -> FinishReason | None:
    """A value that a newer peer may send and we do not know counts as an error."""
    return _FINISH_FROM_PROTO.get(finish, FinishReason.ERROR)


def sampling_to_proto(sampling: SamplingParams) -> pb.Sampling:
    return pb.Sampling(
        max_tokens=sampling.max_tokens,
        seed=sampling.seed,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_tokens=sampling.min_tokens,
        stop_token_ids=sampling.stop_token_ids,
        min_p=sampling.min_p,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        repetition_penalty=sampling.repetition_penalty,
        logit_bias=[pb.LogitBias(token_id=token_id, bias=bias) for token_id, bias in sampling.logit_bias],
        logprobs=sampling.logprobs,
        prompt_logprobs=sampling.prompt_logprobs,
        grammar=_grammar_to_proto(sampling.grammar),
    )


def _grammar_to_proto(grammar: Grammar | None) -> pb.Grammar | None:
    return None if grammar is None else pb.Grammar(kind=grammar.kind, source=grammar.source)


def sampling_from_proto(message: pb.Sampling, vocab_size: int) -> SamplingParams:
    """Raises InvalidRequest if a value is out of range."""
    if message.max_tokens < 1:
        raise InvalidRequest("max_tokens must be at least 1", param="max_tokens")
    if message.seed > MAX_SEED:
        raise InvalidRequest("seed is out of range", param="seed")
    if not (math.isfinite(message.temperature) and message.temperature >= 0):
        raise InvalidRequest("temperature must be a finite number of at least 0", param="temperature")
    if not 0 < message.top_p <= 1:
        raise InvalidRequest("top_p must lie in (0, 1]", param="top_p")
    if any(token_id >= vocab_size for token_id in message.stop_token_ids):
        raise InvalidRequest(f"stop_token_ids must lie below {vocab_size}", param="stop_token_ids")
    if len(message.stop_token_ids) >= vocab_size:
        raise InvalidRequest("stop_token_ids must leave a token that can be sampled", param="stop_token_ids")
    _check_logits(message, vocab_size)
    return SamplingParams(
        max_tokens=message.max_tokens,
        seed=message.seed,
        temperature=message.temperature,
        top_p=message.top_p,
        top_k=message.top_k,
        min_tokens=message.min_tokens,
        stop_token_ids=tuple(message.stop_token_ids),
        min_p=message.min_p,
        presence_penalty=message.presence_penalty,
        frequency_penalty=message.frequency_penalty,
        repetition_penalty=message.repetition_penalty,
        logit_bias=tuple((each.token_id, each.bias) for each in message.logit_bias),
        logprobs=message.logprobs if message.HasField("logprobs") else None,
        prompt_logprobs=message.prompt_logprobs if message.HasField("prompt_logprobs") else None,
        grammar=_grammar_from_proto(message.grammar) if message.HasField("grammar") else None,
    )


def _check_logits(message: pb.Sampling, vocab_size: int) -> None:
    """Raises InvalidRequest if a parameter that changes or reports logits is out of range."""
    if not 0 <= message.min_p <= 1:
        raise InvalidRequest("min_p must lie in [0, 1]", param="min_p")
    for name in ("presence_penalty", "frequency_penalty"):
        if not math.isfinite(getattr(message, name)):
            raise InvalidRequest(f"{name} must be finite", param=name)
    if not (math.isfinite(message.repetition_penalty) and message.repetition_penalty > 0):
        raise InvalidRequest("repetition_penalty must be a finite number above 0", param="repetition_penalty")
    if len(message.logit_bias) > MAX_LOGIT_BIAS:
        raise InvalidRequest(f"logit_bias may name {MAX_LOGIT_BIAS} tokens", param="logit_bias")
    if any(each.token_id >= vocab_size or not math.isfinite(each.bias) for each in message.logit_bias):
        raise InvalidRequest(f"logit_bias must name tokens below {vocab_size}, with finite numbers", param="logit_bias")
    if max(message.logprobs, message.prompt_logprobs) > min(MAX_LOGPROBS, vocab_size):
        raise InvalidRequest(f"logprobs of at most {MAX_LOGPROBS} tokens can be told", param="logprobs")


def _grammar_from_proto(message: pb.Grammar) -> Grammar:
    """Raises InvalidRequest."""
    for kind in _GRAMMAR_KINDS:
        if message.kind == kind:
            if len(message.source.encode()) > MAX_GRAMMAR_BYTES:
                raise InvalidRequest(f"a grammar may have {MAX_GRAMMAR_BYTES} bytes", param="grammar")
            return Grammar(kind, message.source)
    raise InvalidRequest(f"a grammar's kind is one of {', '.join(_GRAMMAR_KINDS)}", param="grammar")


def logprobs_to_proto(logprobs: TokenLogprobs) -> pb.TokenLogprobs:
    return pb.TokenLogprobs(
        logprob=logprobs.logprob, rank=logprobs.rank, top_ids=logprobs.top_ids, top_logprobs=logprobs.top_logprobs
    )


def logprobs_from_proto(message: pb.TokenLogprobs) -> TokenLogprobs:
    return TokenLogprobs(message.logprob, message.rank, tuple(message.top_ids), tuple(message.top_logprobs))


def check_submit(message: pb.Submit, *, vocab_size: int, max_model_len: int) -> None:
    """Raises InvalidRequest if this worker cannot run what is asked."""
    length = len(message.prompt_token_ids) + len(message.output_token_ids)
    if not message.prompt_token_ids:
        raise InvalidRequest("the prompt is empty", param="prompt")
    if length >= max_model_len:
        raise InvalidRequest(f"{length} tokens leave no room in a context of {max_model_len}", param="prompt")
    if len(message.output_token_ids) >= message.sampling.max_tokens:
        raise InvalidRequest("the request has all its tokens already", param="output_token_ids")
    if max(message.prompt_token_ids) >= vocab_size or max(message.output_token_ids, default=0) >= vocab_size:
        raise InvalidRequest(f"token ids must lie below {vocab_size}", param="prompt")
    if len(message.root_key) != KEY_BYTES:
        raise InvalidRequest("root_key must have 16 bytes", param="root_key")
    if len(message.tenant.encode()) > MAX_NAME_BYTES:
        raise InvalidRequest(f"a tenant's name has at most {MAX_NAME_BYTES} bytes", param="tenant")
    if not (math.isfinite(message.remaining_s) and message.remaining_s > 0):
        raise InvalidRequest("the request came after its deadline", param="remaining_s")
