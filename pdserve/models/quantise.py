"""Rounds weights to 8 or 4 bits in groups of 32 columns (pdserve.kernels.quantised)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pdserve.kernels.quantised import GROUP, Bits, QuantisedWeight, pack

_LEAST_SCALE = 2.0**-24  # of float16
_STEPS = (15, 14, 13, 12, 11, 10)  # between the least and the greatest value of a group in 4 bits


@dataclass(frozen=True, slots=True)
class Levels:
    """A weight [N, K] before it is laid out: rows may still be reordered and joined."""

    levels: Tensor  # [N, K] int16, from -128 with 8 bits, from 0 with 4
    scales: Tensor  # [N, K / GROUP, 1 or 2] float16: the scale and, with 4 bits, the value of level 0

    @property
    def bits(self) -> Bits:
        return 8 if self.scales.shape[2] == 1 else 4

    def values(self) -> Tensor:
        """[N, K] float32."""
        rows, groups, _ = self.scales.shape
        values = self.levels.view(rows, groups, GROUP).float() * self.scales[:, :, :1].float()
        return (values if self.bits == 8 else values + self.scales[:, :, 1:].float()).flatten(1)

    def pack(self) -> QuantisedWeight:
        return pack(self.levels, self.scales)


def quantise(weight: Tensor, bits: Bits) -> Levels:
    """Round weight [N, K]; K is a multiple of GROUP."""
    groups = weight.float().reshape(len(weight), -1, GROUP)
    return _to_8_bits(groups) if bits == 8 else _to_4_bits(groups)


def _to_8_bits(groups: Tensor) -> Levels:
    scale = (groups.abs().amax(-1, keepdim=True) / 127).clamp(min=_LEAST_SCALE).half()
    levels = (groups / scale.float()).round_().clamp_(-127, 127)
    return Levels(levels.to(torch.int16).flatten(1), scale)


def _to_4_bits(groups: Tensor) -> Levels:
    """From the least to the greatest value of a group to 16 levels or, where that comes nearer, to fewer: weights that
    have been in 4 bits before lie on such a grid."""
    best = _rounded(groups, _STEPS[0])
    for steps in _STEPS[1:]:
        other = _rounded(groups, steps)
        better = other.error < best.error
        best = _Rounded(*(torch.where(better, ours, theirs) for ours, theirs in zip(other, best, strict=True)))
    return Levels(best.levels.to(torch.int16).flatten(1), torch.cat((best.scale, best.least), dim=-1))


class _Rounded(NamedTuple):
    """Groups [N, G, GROUP] on a grid; what belongs to a group is [N, G, 1]."""

    levels: Tensor
    scale: Tensor  # float16
    least: Tensor  # float16, the value of level 0
    error: Tensor


def _rounded(groups: Tensor, steps: int) -> _Rounded:
    least, greatest = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scale = ((greatest - least) / steps).clamp(min=_LEAST_SCALE).half()
    least = least.half()
    levels = (groups - least.float()).div_(scale.float()).round_().clamp_(0, 15)
    error = (levels * scale.float() + least.float() - groups).square_().sum(-1, keepdim=True)
    return _Rounded(levels, scale, least, error)
