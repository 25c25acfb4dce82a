"""The next token from logits. Counter-based: the choice depends on the logits, the parameters, the sequence, the
seed and the index of the output token, and on nothing else: not on the batch, the worker, or what was drawn before.

In this order, as vLLM has it: bias, tokens that may not come yet, penalties, grammar, temperature, min_p, top_k, top_p.
A row is sampled by inverting its cumulative distribution at one uniform number u(seed, index): in falling order where
top_k or top_p cut it, equal ones in that of token ids, and in that of token ids where nothing is cut. A logit that is
not a number makes its row's choice arbitrary, and nothing else.

Two implementations: torch's (pdserve.engine.torch_sampler), the reference, and a compiled one
(pdserve.engine.native_sampler). They draw the same, up to the rounding of float32 exponentials.
"""

from __future__ import annotations

import struct
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Protocol

import torch
from torch import Tensor

from pdserve.engine.token_counts import TokenCounts
from pdserve.request import SamplingParams, TokenLogprobs

LEAST_TEMPERATURE = 1e-6  # below it counts as this
_COUNTER = struct.Struct("<QQ")


class Mask(Protocol):
    """Which tokens may come next; `pdserve.engine.grammar` has the real one."""

    def allowed(self) -> bytes | None:
        """One byte a token of the vocabulary, 0 where it may not come; None: all may."""
        ...


@dataclass(frozen=True, slots=True)
class SamplingRow:
    """How to sample one row; `index` counts the output tokens of its sequence from 0."""

    params: SamplingParams
    index: int
    counts: TokenCounts | None = None  # if the parameters penalise
    mask: Mask | None = None

    @property
    def held_back(self) -> tuple[int, ...]:
        """Tokens that may not come yet."""
        return self.params.stop_token_ids if self.index < self.params.min_tokens else ()

    @property
    def adjusts(self) -> bool:
        """Something may change which token is the likeliest."""
        return bool(self.params.logit_bias or self.held_back or self.counts is not None or self.mask is not None)


@dataclass(frozen=True, slots=True)
class Sampled:
    token_id: int
    logprobs: TokenLogprobs | None = None  # if asked for


def uniform(seed: int, index: int) -> float:
    """A number in [0, 1) that is a pure function of its arguments."""
    digest = blake2b(_COUNTER.pack(seed, index), digest_size=8).digest()
    return float((int.from_bytes(digest, "little") >> 11) * 2.0**-53)


class Sampler(ABC):
    """Stateless: a row's result depends on that row alone."""

    @abstractmethod
    def choose(self, logits: Tensor, rows: Sequence[SamplingRow]) -> list[int]:
        """logits float32 [rows, vocab], which stay as they are -> a token id for each row."""

    @abstractmethod
    def describe(self, logits: Tensor, token_ids: Sequence[int], num_top: int) -> list[TokenLogprobs]:
        """What the model thought of one token a row, and of its `num_top` likeliest. logits float32 [rows, vocab]."""

    def sample(self, logits: Tensor, rows: Sequence[SamplingRow]) -> list[Sampled]:
        """logits float32 [rows, vocab] -> a token for each row, with log probabilities where they are asked for."""
        token_ids = self.choose(logits, rows)
        sampled = [Sampled(token_id) for token_id in token_ids]
        told = [i for i, row in enumerate(rows) if row.params.logprobs is not None]
        if told:
            if len(told) < len(rows):
                logits = logits.index_select(0, torch.tensor(told))
            most = max(rows[i].params.logprobs or 0 for i in told)
            described = self.describe(logits, [token_ids[i] for i in told], most)
            for i, each in zip(told, described, strict=True):
                sampled[i] = Sampled(token_ids[i], _first(each, rows[i].params.logprobs or 0))
        return sampled


def _first(logprobs: TokenLogprobs, count: int) -> TokenLogprobs:
    return TokenLogprobs(logprobs.logprob, logprobs.rank, logprobs.top_ids[:count], logprobs.top_logprobs[:count])
