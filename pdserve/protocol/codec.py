"""Between protobuf messages and our own types. What a peer sends is checked here, before anything acts on it."""

from __future__ import annotations

import math

from kvstore.keys import KEY_BYTES
from pdserve.errors import InvalidRequest
from pdserve.protocol import worker_pb2 as pb
from pdserve.request import MAX_SEED, FinishReason, SamplingParams

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
    )


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
    return SamplingParams(
        max_tokens=message.max_tokens,
        seed=message.seed,
        temperature=message.temperature,
        top_p=message.top_p,
        top_k=message.top_k,
        min_tokens=message.min_tokens,
        stop_token_ids=tuple(message.stop_token_ids),
    )


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
    if not (math.isfinite(message.remaining_s) and message.remaining_s > 0):
        raise InvalidRequest("the request came after its deadline", param="remaining_s")
