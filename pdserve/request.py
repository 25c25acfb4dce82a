"""What a client asked for, as the system carries it: immutable, validated at the door, free of torch."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from kvstore.keys import BlockKey

MAX_SEED = 2**63 - 1


class FinishReason(Enum):
    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen and when a sequence ends.

    `seed` is always set (the router draws one when the client did not), and the stream depends on (seed, index of the
    output token) only. So a request that moves to another worker goes on as if it had not moved.

    Stop strings are not here: the engine is ignorant of text, the router watches for them and aborts.
    """

    max_tokens: int
    seed: int
    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0
    top_k: int = 0  # 0 keeps all
    min_tokens: int = 0  # stop tokens cannot be sampled before this many output tokens
    stop_token_ids: tuple[int, ...] = ()  # the model's end-of-sequence tokens included, unless ignored

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0


@dataclass(frozen=True, slots=True)
class Request:
    """One generation, from the client to its end.

    `deadline_s` is a point on the local monotonic clock; across processes the remaining seconds travel.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    root_key: BlockKey
    deadline_s: float
