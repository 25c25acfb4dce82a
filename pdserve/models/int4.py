"""Weights in 4 bits: groups of 32 columns with a scale and a zero each, in the layout of torch's own product.

A decode step is bound by reading weights, and these are a quarter as many bytes. Beside them stay the dense weights
that the 4 bits stand for, for batches of many rows, where products in bfloat16 are faster: the two are one model, so
a request may be prefilled with one and decoded with the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pdserve.kernels.base import INT4_GROUP

_ROWS_STEP = 16  # of torch's layout
_STEPS = (15, 14, 13, 12, 11, 10)  # between the least and the greatest value of a group


@dataclass(frozen=True, slots=True)
class Quantised:
    dense: Tensor  # [N, K] bfloat16
    packed: Tensor  # [N, K / 2] uint8
    scales: Tensor  # [K / INT4_GROUP, N, 2] bfloat16: scale, and the value of level 8


def fits(shape: tuple[int, ...]) -> bool:
    """Whether a weight of this shape can be kept so."""
    return len(shape) == 2 and shape[0] % _ROWS_STEP == 0 and shape[1] % INT4_GROUP == 0


def shapes(shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of `packed` and of `scales`."""
    rows, columns = shape
    return (rows, columns // 2), (columns // INT4_GROUP, rows, 2)


def quantise(weight: Tensor) -> Quantised:
    """Round each group of weight [N, K] to levels from its least to its greatest value.

    To 16 of them or, where that comes nearer, to fewer: weights that have been in 4 bits before lie on such a grid.
    """
    rows, columns = weight.shape
    groups = weight.float().view(rows, columns // INT4_GROUP, INT4_GROUP)
    best = _rounded(groups, _STEPS[0])
    for steps in _STEPS[1:]:
        other = _rounded(groups, steps)
        better = other.error < best.error
        best = _Rounded(*(_choose(better, ours, theirs) for ours, theirs in zip(other, best, strict=True)))
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(best.levels.view(rows, columns), 1)
    scales = torch.stack((best.scale, best.middle), dim=-1).transpose(0, 1).contiguous()
    return Quantised(_values(best.levels, best.scale, best.middle).bfloat16().view(rows, columns), packed, scales)


class _Rounded(NamedTuple):
    """Groups [N, G, INT4_GROUP] on a grid; what belongs to a group is [N, G]."""

    levels: Tensor  # int32
    scale: Tensor  # bfloat16
    middle: Tensor  # bfloat16, the value of level 8
    error: Tensor


def _rounded(groups: Tensor, steps: int) -> _Rounded:
    least, greatest = groups.amin(-1), groups.amax(-1)
    scale = ((greatest - least) / steps).clamp(min=1e-12).bfloat16()
    middle = (least + 8 * scale.float()).bfloat16()
    levels = (groups - middle.float().unsqueeze(-1)).div_(scale.float().unsqueeze(-1)).add_(8).round_().clamp_(0, 15)
    error = (_values(levels, scale, middle) - groups).square_().sum(-1)
    return _Rounded(levels.int(), scale, middle, error)


def _values(levels: Tensor, scale: Tensor, middle: Tensor) -> Tensor:
    return (levels.float() - 8).mul_(scale.float().unsqueeze(-1)).add_(middle.float().unsqueeze(-1))


def _choose(better: Tensor, ours: Tensor, theirs: Tensor) -> Tensor:
    return torch.where(better.unsqueeze(-1) if ours.dim() > better.dim() else better, ours, theirs)


def layout() -> str:
    """Names the layout of packed weights, which differs between machines."""
    return f"{torch.__version__} {torch.backends.cpu.get_cpu_capability()}"
