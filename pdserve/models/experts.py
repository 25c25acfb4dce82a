"""A mixture of experts in place of a layer's MLP (arXiv 1701.06538; Mixtral, arXiv 2401.04088).

Each token goes to its `per_token` likeliest experts. Rows are sorted by expert, so that each expert multiplies one run
of rows: on CUDA in one grouped product for all, elsewhere one after the other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.functional import linear

from pdserve.models.config import ExpertsConfig


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """E experts, H hidden, I intermediate of an expert."""

    router: Tensor  # [E, H]
    gate_up: Tensor  # [E, 2 I, H], rows of gate, then up
    down: Tensor  # [E, H, I]
    shared_gate: Tensor | None  # [1, H], how much of the shared expert each token gets


def mix(x: Tensor, weights: ExpertWeights, config: ExpertsConfig, activate: Callable[[Tensor], Tensor]) -> Tensor:
    """x [T, H] -> [T, H]: what its experts make of each token, weighted; without the shared expert."""
    tokens, hidden = x.shape
    likelihood = linear(x, weights.router).float().softmax(dim=-1)
    shares, chosen = likelihood.topk(config.per_token, dim=-1)
    if config.normalised:
        shares = shares / shares.sum(dim=-1, keepdim=True)
    expert = chosen.flatten()
    order = expert.argsort(stable=True)
    counts = (expert == torch.arange(config.count, device=x.device).unsqueeze(1)).sum(dim=1)  # bincount would wait
    ends = counts.cumsum(0).int()
    rows = x[order // config.per_token]
    out = _grouped(activate(_grouped(rows, weights.gate_up, ends)), weights.down, ends)
    out = out * shares.flatten()[order].to(out.dtype).unsqueeze(1)
    # Each row back to where it came from: adding up in the order of arrival would not be repeatable.
    unsorted = torch.empty_like(out)
    unsorted[order] = out
    return unsorted.view(tokens, config.per_token, hidden).sum(dim=1)


def _grouped(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """x [rows, K], of which expert e has those before ends[e] that no other has; weight [E, N, K] -> [rows, N]."""
    if x.is_cuda and x.dtype == torch.bfloat16:
        return _in_one_product(x, weight, ends)
    out = x.new_empty(x.shape[0], weight.shape[1])
    start = 0
    for each, end in zip(weight, ends.tolist(), strict=True):
        if end > start:
            out[start:end] = linear(x[start:end], each)
        start = end
    return out


def _in_one_product(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """The same by torch's grouped product, which knows bfloat16 and does not wait for `ends`."""
    product: Tensor = functional.grouped_mm(x, weight.transpose(1, 2), offs=ends)
    return product
