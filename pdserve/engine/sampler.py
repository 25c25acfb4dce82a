"""The next token from logits. Counter-based: the choice depends on the logits, the parameters, the seed and the index
of the output token, and on nothing else: not on the batch, the worker, or what was sampled before.

A row is sampled by inverting its cumulative distribution at one uniform number u(seed, index).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import torch
from torch import Tensor

from pdserve.request import SamplingParams

_COUNTER = struct.Struct("<QQ")
# Most of the mass of a usual distribution lies in so few tokens; sorting these alone is 20 times cheaper.
_TOP_P_FIRST_LOOK = 512


@dataclass(frozen=True, slots=True)
class SamplingRow:
    """How to sample one row; `index` counts the output tokens of its sequence from 0."""

    params: SamplingParams
    index: int


def uniform(seed: int, index: int) -> float:
    """A number in [0, 1) that is a pure function of its arguments."""
    digest = blake2b(_COUNTER.pack(seed, index), digest_size=8).digest()
    return float((int.from_bytes(digest, "little") >> 11) * 2.0**-53)


def sample(logits: Tensor, rows: Sequence[SamplingRow]) -> list[int]:
    """logits float32 [rows, vocab] -> a token id for each row. `logits` may be overwritten."""
    for i, row in enumerate(rows):
        if row.index < row.params.min_tokens and row.params.stop_token_ids:
            logits[i, list(row.params.stop_token_ids)] = float("-inf")
    token_ids: list[int] = logits.argmax(dim=-1).tolist()
    for i, row in enumerate(rows):
        if not row.params.greedy:
            token_ids[i] = _sample_row(logits[i], row.params, uniform(row.params.seed, row.index))
    return token_ids


def _sample_row(logits: Tensor, params: SamplingParams, u: float) -> int:
    """logits [vocab]; top_k is applied before top_p, as OpenAI-compatible servers do."""
    # Shifting by the maximum before dividing keeps a tiny temperature from overflowing to inf - inf.
    # An infinite maximum, or a row masked everywhere, gives inf - inf: those entries are the maximum, so they are 0.
    scaled = (logits - logits.max()).nan_to_num_(nan=0.0, neginf=-math.inf) / max(params.temperature, 1e-6)
    if 0 < params.top_k < scaled.numel():
        scaled, candidates = _largest(scaled, params.top_k)
    elif params.top_p < 1.0:
        scaled, candidates = _nucleus_candidates(scaled, params.top_p)
    else:
        candidates = None
    weights = torch.exp(scaled.double())
    cumulative = weights.cumsum(0)
    if params.top_p < 1.0:
        # Keep the smallest set that reaches top_p: a token stays if what stands before it has not reached it yet.
        kept = int(torch.searchsorted(cumulative, params.top_p * cumulative[-1]).item()) + 1
        cumulative = cumulative[: min(kept, cumulative.numel())]
    position = int(torch.searchsorted(cumulative, u * cumulative[-1], right=True).item())
    position = min(position, cumulative.numel() - 1)
    return position if candidates is None else int(candidates[position].item())


def _largest(scaled: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest, in falling order, equal ones in order of token id, as in a stable sort of all."""
    values, ids = torch.topk(scaled, count)
    # topk breaks ties at will: take those above the smallest kept value, then the first ids that equal it.
    floor = values[-1]
    above = ids[values > floor].sort().values
    equal = (scaled == floor).nonzero(as_tuple=True)[0][: count - above.numel()]
    chosen = torch.cat((above, equal))
    order = scaled[chosen].sort(descending=True, stable=True).indices
    return scaled[chosen][order], chosen[order]


def _nucleus_candidates(scaled: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """Enough of the largest to cover top_p of the mass; the mass of the rest is appended, to keep proportions true."""
    total = torch.exp(scaled.double()).sum()
    count = min(_TOP_P_FIRST_LOOK, scaled.numel())
    values, ids = _largest(scaled, count)
    mass = torch.exp(values.double()).sum()
    if count == scaled.numel() or mass < top_p * total:
        return _largest(scaled, scaled.numel())
    rest = (total - mass).clamp_min(torch.finfo(torch.float64).tiny)
    # The appended entry stands behind at least top_p of the mass, so it is always cut off before a choice is made.
    return torch.cat((values, rest.log().float().view(1))), torch.cat((ids, ids[-1:]))
