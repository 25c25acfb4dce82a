"""The sampler in torch, row by row: the reference, and what is used where nothing could be compiled."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pdserve.engine.sampler import LEAST_TEMPERATURE, Sampler, SamplingRow, uniform
from pdserve.engine.token_counts import TokenCounts
from pdserve.request import SamplingParams, TokenLogprobs

# Most of the mass of a usual distribution lies in so few tokens; sorting these alone is 20 times cheaper.
_TOP_P_FIRST_LOOK = 512


class TorchSampler(Sampler):
    def choose(self, logits: Tensor, rows: Sequence[SamplingRow]) -> list[int]:
        return [_choose(own, row) for own, row in zip(logits, rows, strict=True)]

    def describe(self, logits: Tensor, token_ids: Sequence[int], num_top: int) -> list[TokenLogprobs]:
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


def adjusted(logits: Tensor, row: SamplingRow) -> Tensor:
    """logits [vocab] -> after everything that may change which token is the likeliest; a copy, where there is any."""
    if not row.adjusts:
        return logits
    logits, params = logits.clone(), row.params
    if params.logit_bias:
        ids, biases = zip(*params.logit_bias, strict=True)
        logits.index_add_(0, torch.tensor(ids), torch.tensor(biases, dtype=logits.dtype))
    if row.held_back:
        logits[list(row.held_back)] = float("-inf")
    if row.counts is not None:
        _penalise(logits, params, row.counts)
    allowed = None if row.mask is None else row.mask.allowed()
    if allowed is not None:
        logits.masked_fill_(torch.frombuffer(bytearray(allowed), dtype=torch.uint8) == 0, float("-inf"))
    return logits


def _penalise(logits: Tensor, params: SamplingParams, counts: TokenCounts) -> None:
    ids = torch.from_numpy(counts.token_ids)
    in_output = torch.from_numpy(counts.in_output)
    values = logits[ids]
    if params.repetition_penalty != 1.0:
        values = torch.where(values > 0, values / params.repetition_penalty, values * params.repetition_penalty)
    values -= params.frequency_penalty * in_output + params.presence_penalty * (in_output > 0)
    logits[ids] = values


def _choose(logits: Tensor, row: SamplingRow) -> int:
    """logits [vocab]; top_k is applied before top_p, as OpenAI-compatible servers do."""
    params = row.params
    logits = adjusted(logits, row)
    likeliest = int(logits.argmax())
    if params.greedy:
        return likeliest
    peak = logits[likeliest]
    if not math.isfinite(peak):
        # An infinite maximum, or a row masked everywhere, gives inf - inf: these are the maximum, so they are 0.
        logits = (logits - peak).nan_to_num_(nan=0.0, neginf=-math.inf)
        peak = logits.new_zeros(())
    candidates = None
    if 0 < params.top_k < logits.numel():
        logits, candidates = _largest(logits, params.top_k)
    # Shifting by the maximum before dividing keeps a tiny temperature from overflowing to inf - inf.
    scaled = (logits - peak) / max(params.temperature, LEAST_TEMPERATURE)
    if params.min_p > 0:
        scaled[scaled < math.log(params.min_p)] = -math.inf  # the likeliest stands at 0
    if candidates is None and params.top_p < 1.0:
        scaled, candidates = _nucleus_candidates(scaled, params.top_p)
    cumulative = torch.exp(scaled).cumsum(0, dtype=torch.float64)
    if params.top_p < 1.0:
        # Keep the smallest set that reaches top_p: a token stays if what stands before it has not reached it yet.
        kept = int(torch.searchsorted(cumulative, params.top_p * cumulative[-1]).item()) + 1
        cumulative = cumulative[: min(kept, cumulative.numel())]
    drawn = uniform(params.seed, row.index) * cumulative[-1]
    position = int(torch.searchsorted(cumulative, drawn, right=True).item())
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
