"""The next tokens of many rows at once, where the logits are: what `pdserve.engine.sampler` draws row by row.

The random number of a row is the same, `uniform(seed, index)`, known before the logits are and sent along. It is used
in the same way, by inverting the cumulative distribution in the same order (falling where top_k or top_p cut it, else
that of token ids). So a request that moves between devices draws on from where it was; a token differs only where the
devices' own rounding of logits and sums puts the number on the other side of a boundary.

Two implementations: torch's here, which sorts, and a Triton kernel that searches (pdserve.kernels.triton_sampler).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pdserve.engine.sampler import LEAST_TEMPERATURE, SamplingRow, uniform

COLUMNS = 5


@dataclass(frozen=True, slots=True)
class RowParams:
    """[rows] each; a greedy row has top_k 1."""

    temperature: Tensor  # float64, as the others: one tensor is sent
    top_k: Tensor  # 0: all
    top_p: Tensor
    min_p: Tensor
    uniform: Tensor


Chooser = Callable[[Tensor, RowParams], Tensor]  # logits float32 [rows, vocab] -> token ids int64 [rows]


def plain(row: SamplingRow) -> bool:
    """Nothing but temperature, top_k, top_p and min_p; any other row is sampled on the host, from its logits."""
    return not row.adjusts and row.params.logprobs is None


def columns(rows: Sequence[SamplingRow]) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    """[COLUMNS, rows], the fields of `RowParams` in order."""
    table = np.empty((COLUMNS, len(rows)))
    for i, row in enumerate(rows):
        params = row.params
        if params.greedy:
            table[:, i] = (1.0, 1, 1.0, 0.0, 0.0)
        else:
            drawn = uniform(params.seed, row.index)
            table[:, i] = (
                max(params.temperature, LEAST_TEMPERATURE),
                max(params.top_k, 0),
                params.top_p,
                params.min_p,
                drawn,
            )
    return table


def choose_tokens(logits: Tensor, params: RowParams) -> Tensor:
    """In torch; see the module."""
    vocab = logits.shape[1]
    top_k = params.top_k.unsqueeze(1)
    top_k = torch.where((top_k > 0) & (top_k < vocab), top_k, vocab)
    top_p, min_p = params.top_p.unsqueeze(1), params.min_p.unsqueeze(1)
    values, ids = logits.sort(dim=-1, descending=True, stable=True)
    # An infinite maximum gives inf - inf: these are the maximum, so they are 0.
    shifted = (values - values[:, :1]).nan_to_num_(nan=0.0, neginf=-torch.inf)
    scaled = shifted / params.temperature.float().unsqueeze(1)
    rank = torch.arange(vocab, device=logits.device)
    dropped = (rank >= top_k) | (scaled < min_p.log().float())
    weights = scaled.masked_fill(dropped, -torch.inf).exp()
    # Where nothing is cut the order is that of token ids.
    uncut = (top_k >= vocab) & (top_p >= 1.0)
    weights = torch.where(uncut, torch.empty_like(weights).scatter_(1, ids, weights), weights)
    ids = torch.where(uncut, rank, ids)
    cumulative = weights.cumsum(dim=1, dtype=torch.float64)
    # Up to the first that reaches top_p, itself included.
    last = (cumulative < top_p * cumulative[:, -1:]).sum(dim=1, keepdim=True).clamp_max(vocab - 1)
    last = torch.where(top_p < 1.0, last, vocab - 1)
    drawn = params.uniform.unsqueeze(1) * cumulative.gather(1, last)
    position = torch.minimum((cumulative <= drawn).sum(dim=1, keepdim=True), last)
    return ids.gather(1, position).squeeze(1)


def chooser(device: torch.device) -> Chooser:
    """The fastest that the device has."""
    if device.type == "cuda":
        try:
            from pdserve.kernels import triton_sampler
        except ImportError:  # torch's CUDA builds bring triton; without it sorting works as well
            return choose_tokens
        return lambda logits, params: triton_sampler.choose_tokens(
            logits, params.temperature, params.top_k, params.top_p, params.min_p, params.uniform
        )
    return choose_tokens
