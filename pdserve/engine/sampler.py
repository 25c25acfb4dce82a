"""The next token from logits. Counter-based: the choice depends on the logits, the parameters, the sequence, the
seed and the index of the output token, and on nothing else: not on the batch, the worker, or what was drawn before.

In this order, as vLLM has it: bias, tokens that may not come yet, penalties, grammar, temperature, min_p, top_k, top_p.
A row is sampled by inverting its cumulative distribution at one uniform number u(seed, index).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Protocol

import torch
from torch import Tensor

from pdserve.engine.token_counts import TokenCounts
from pdserve.request import SamplingParams, TokenLogprobs

_COUNTER = struct.Struct("<QQ")
# Most of the mass of a usual distribution lies in so few tokens; sorting these alone is 20 times cheaper.
_TOP_P_FIRST_LOOK = 512


class Mask(Protocol):
    """Which tokens may come next; `pdserve.engine.grammar` has the real one."""

    def apply(self, logits: Tensor) -> None:
        """logits [vocab]: those of tokens that may not come become -inf."""
        ...


@dataclass(frozen=True, slots=True)
class SamplingRow:
    """How to sample one row; `index` counts the output tokens of its sequence from 0."""

    params: SamplingParams
    index: int
    counts: TokenCounts | None = None  # if the parameters penalise
    mask: Mask | None = None


@dataclass(frozen=True, slots=True)
class Sampled:
    token_id: int
    logprobs: TokenLogprobs | None = None  # if asked for


def uniform(seed: int, index: int) -> float:
    """A number in [0, 1) that is a pure function of its arguments."""
    digest = blake2b(_COUNTER.pack(seed, index), digest_size=8).digest()
    return float((int.from_bytes(digest, "little") >> 11) * 2.0**-53)


def sample(logits: Tensor, rows: Sequence[SamplingRow]) -> list[Sampled]:
    """logits float32 [rows, vocab] -> a token for each row. `logits` may be overwritten."""
    told = [i for i, row in enumerate(rows) if row.params.logprobs is not None]
    raw = logits.index_select(0, torch.tensor(told)) if told else None  # a copy: what follows changes the logits
    for i, row in enumerate(rows):
        _adjust(logits[i], row)
    token_ids: list[int] = logits.argmax(dim=-1).tolist()
    for i, row in enumerate(rows):
        if not row.params.greedy:
            token_ids[i] = _sample_row(logits[i], token_ids[i], row.params, uniform(row.params.seed, row.index))
    sampled = [Sampled(token_id) for token_id in token_ids]
    if raw is not None:
        most = max(rows[i].params.logprobs or 0 for i in told)
        for i, each in zip(told, describe(raw, [token_ids[i] for i in told], most), strict=True):
            sampled[i] = Sampled(token_ids[i], _first(each, rows[i].params.logprobs or 0))
    return sampled


def describe(logits: Tensor, token_ids: Sequence[int], num_top: int) -> list[TokenLogprobs]:
    """What the model thought of one token a row, and of its `num_top` likeliest. logits float32 [rows, vocab]."""
    ids = torch.tensor(token_ids).unsqueeze(1)
    total = logits.logsumexp(dim=-1, keepdim=True)
    chosen = logits.gather(1, ids)
    ranks = (logits > chosen).sum(dim=-1) + 1
    if num_top:
        top, top_ids = torch.topk(logits, num_top)
        tops, tops_ids = (top - total).tolist(), top_ids.tolist()
    else:
        tops = tops_ids = [()] * len(token_ids)
    own = (chosen - total).squeeze(1).tolist()
    return [
        TokenLogprobs(logprob, rank, tuple(ids), tuple(values))
        for logprob, rank, ids, values in zip(own, ranks.tolist(), tops_ids, tops, strict=True)
    ]


def _first(logprobs: TokenLogprobs, count: int) -> TokenLogprobs:
    return TokenLogprobs(logprobs.logprob, logprobs.rank, logprobs.top_ids[:count], logprobs.top_logprobs[:count])


def _adjust(logits: Tensor, row: SamplingRow) -> None:
    """logits [vocab], in place: everything that may change which token is the likeliest."""
    params = row.params
    if params.logit_bias:
        ids, biases = zip(*params.logit_bias, strict=True)
        logits.index_add_(0, torch.tensor(ids), torch.tensor(biases, dtype=logits.dtype))
    if row.index < params.min_tokens and params.stop_token_ids:
        logits[list(params.stop_token_ids)] = float("-inf")
    if row.counts is not None:
        _penalise(logits, params, row.counts)
    if row.mask is not None:
        row.mask.apply(logits)


def _penalise(logits: Tensor, params: SamplingParams, counts: TokenCounts) -> None:
    ids = torch.from_numpy(counts.token_ids)
    in_output = torch.from_numpy(counts.in_output)
    values = logits[ids]
    if params.repetition_penalty != 1.0:
        values = torch.where(values > 0, values / params.repetition_penalty, values * params.repetition_penalty)
    values -= params.frequency_penalty * in_output + params.presence_penalty * (in_output > 0)
    logits[ids] = values


def _sample_row(logits: Tensor, likeliest: int, params: SamplingParams, u: float) -> int:
    """logits [vocab]; top_k is applied before top_p, as OpenAI-compatible servers do."""
    peak = logits[likeliest]
    if not math.isfinite(peak):
        # An infinite maximum, or a row masked everywhere, gives inf - inf: these are the maximum, so they are 0.
        logits = (logits - peak).nan_to_num_(nan=0.0, neginf=-math.inf)
        peak = logits.new_zeros(())
    candidates = None
    if 0 < params.top_k < logits.numel():
        logits, candidates = _largest(logits, params.top_k)
    # Shifting by the maximum before dividing keeps a tiny temperature from overflowing to inf - inf.
    scaled = (logits - peak) / max(params.temperature, 1e-6)
    if params.min_p > 0:
        scaled[scaled < math.log(params.min_p)] = -math.inf  # the likeliest stands at 0
    if candidates is None and params.top_p < 1.0:
        scaled, candidates = _nucleus_candidates(scaled, params.top_p)
    cumulative = torch.exp(scaled).cumsum(0, dtype=torch.float64)
    if params.top_p < 1.0:
        # Keep the smallest set that reaches top_p: a token stays if what stands before it has not reached it yet.
        kept = int(torch.searchsorted(cumulative, params.top_p * cumulative[-1]).item()) + 1
        cumulative = cumulative[: min(kept, cumulative.numel())]
    position = int(torch.searchsorted(cumulative, u * cumulative[-1], right=True).item())
    position = min(position, cumulative.numel() - 1)
    return position if candidates is None else int(candidates[position].item())


def _largest(scaled: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest, in falling order, equal ones in order of token id, as in a stable sort of all."""
    # One more tells whether the border runs between equal values, of which topk takes any.
    values, ids = torch.topk(scaled, min(count + 1, scaled.numel()))
    if len(values) > count and values[count] == values[count - 1]:
        floor = values[count - 1]
        above = ids[values > floor]
        equal = (scaled == floor).nonzero(as_tuple=True)[0][: count - above.numel()]
        ids = torch.cat((above, equal))
    ids = ids[:count].sort().values
    values, order = scaled[ids].sort(descending=True, stable=True)
    return values, ids[order]


def _nucleus_candidates(scaled: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """Enough of the largest to cover top_p of the mass; the mass of the rest is appended, to keep proportions true."""
    total = torch.exp(scaled).sum(dtype=torch.float64)
    count = min(_TOP_P_FIRST_LOOK, scaled.numel())
    values, ids = _largest(scaled, count)
    mass = torch.exp(values).sum(dtype=torch.float64)
    if count == scaled.numel() or mass < top_p * total:
        return _largest(scaled, scaled.numel())
    rest = (total - mass).clamp_min(torch.finfo(torch.float64).tiny)
    # The appended entry stands behind at least top_p of the mass, so it is always cut off before a choice is made.
    return torch.cat((values, rest.log().float().view(1))), torch.cat((ids, ids[-1:]))
