"""What a client asked for, as the system carries it: immutable, validated at the door, free of torch."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Literal

from kvstore.keys import BlockKey

MAX_SEED = 2**63 - 1

GrammarKind = Literal["json_schema", "regex", "lark"]


class FinishReason(Enum):
    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class Grammar:
    """What the output's text must be: `source` is a JSON schema, a regular expression, or a Lark grammar, by `kind`."""

    kind: GrammarKind
    source: str


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """What the model thought of one token, before any sampling parameter was applied: natural logarithms."""

    logprob: float
    rank: int  # 1 is the likeliest
    top_ids: tuple[int, ...]  # the likeliest, in falling order; the token itself may be one of them
    top_logprobs: tuple[float, ...]


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
    min_p: float = 0.0  # tokens less likely than this share of the likeliest are left out
    presence_penalty: float = 0.0  # taken from the logit of each token that the output has
    frequency_penalty: float = 0.0  # the same, for each time that it has it
    repetition_penalty: float = 1.0  # divides the logits of tokens that prompt or output have (negative ones: times it)
    logit_bias: tuple[tuple[int, float], ...] = ()  # token id, added to its logit
    logprobs: int | None = None  # likeliest tokens told beside each output token; None tells nothing
    prompt_logprobs: int | None = None  # the same for the prompt's tokens, which then are all computed
    grammar: Grammar | None = None

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def penalises(self) -> bool:
        return bool(self.presence_penalty or self.frequency_penalty) or self.repetition_penalty != 1.0


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
    tenant: str = ""  # whose quota in the store its blocks count against; "" has none
