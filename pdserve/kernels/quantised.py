"""Weights in 8 or 4 bits, and what a product with them is.

Each 32 columns of a row share a scale: `level * scale` with levels from -128 to 127, or `level * scale + least` with
levels from 0 to 15. What they are multiplied with is rounded too, to 8 bits in groups of 32 (`rounded`), so that the
products of a group are summed exactly in integers. Every implementation rounds so: decode and prefill, one row and
many, are one model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Bits = Literal[8, 4]
GROUP = 32  # columns that share a scale
BAND = 16  # rows that lie interleaved
_MIDDLE = 128  # added to levels of 8 bits, which are stored unsigned


@dataclass(frozen=True, slots=True)
class QuantisedWeight:
    """A weight [N, K]; N is a multiple of BAND, K of GROUP.

    The bytes of a band and a group are four columns of each of the 16 rows, then the next four columns; with 4 bits,
    the low halves are four columns and the high halves the four that follow.
    """

    data: Tensor  # [N / BAND, K / GROUP, 64 * bits] uint8
    scales: Tensor  # [N / BAND, K / GROUP, 1 or 2, BAND] float16: the scale and, with 4 bits, the value of level 0

    @property
    def bits(self) -> Bits:
        return 8 if self.scales.shape[2] == 1 else 4

    @property
    def shape(self) -> tuple[int, int]:
        bands, groups, _ = self.data.shape
        return bands * BAND, groups * GROUP

    def values(self) -> Tensor:
        """[N, K] float32."""
        return self.rows(torch.arange(self.shape[0]))

    def rows(self, indices: Tensor) -> Tensor:
        """Of indices [T] -> [T, K] float32."""
        bands, groups, _ = self.data.shape
        band, lane = indices // BAND, indices % BAND
        data = self.data.view(bands, groups, -1, BAND, 4)[band, :, :, lane]  # [T, groups, 8 or 4, 4]
        scales = self.scales.transpose(2, 3)[band, :, lane].float().unsqueeze(3)  # [T, groups, 1 or 2, 1]
        shape = (len(indices), groups, GROUP)
        if self.bits == 8:
            values = (data.float() - _MIDDLE).view(shape) * scales[:, :, 0]
        else:
            levels = torch.stack((data & 15, data >> 4), dim=3).float()
            values = levels.view(shape) * scales[:, :, 0] + scales[:, :, 1]
        return values.flatten(1)


def fits(shape: tuple[int, ...]) -> bool:
    """Whether a weight of this shape can be kept so."""
    return len(shape) == 2 and shape[0] % BAND == 0 and shape[1] % GROUP == 0


def packed_shapes(shape: tuple[int, ...], bits: Bits) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of `data` and of `scales`."""
    at = (shape[0] // BAND, shape[1] // GROUP)
    return (*at, 64 * bits), (*at, 8 // bits, BAND)


def pack(levels: Tensor, scales: Tensor) -> QuantisedWeight:
    """levels [N, K] int16, from -128 or from 0 on; scales [N, K / GROUP, 1 or 2] float16, one with 8 bits."""
    rows, groups, count = scales.shape
    bands = rows // BAND
    quads = levels.view(bands, BAND, groups, 8, 4).permute(0, 2, 3, 1, 4)  # [bands, groups, 8, BAND, 4]
    if count == 1:
        data = (quads + _MIDDLE).to(torch.uint8)
    else:
        low, high = quads.to(torch.uint8).reshape(bands, groups, 4, 2, BAND, 4).unbind(3)
        data = low | high << 4
    laid = scales.view(bands, BAND, groups, count).permute(0, 2, 3, 1)
    return QuantisedWeight(data.reshape(bands, groups, -1), laid.contiguous())


def rounded(x: Tensor) -> Tensor:
    """x [..., K] as products see it: each group of 32 on 255 levels; float32."""
    groups = x.float().reshape(*x.shape[:-1], -1, GROUP)
    most = groups.abs().amax(-1, keepdim=True)
    levels = (groups * torch.where(most > 0, 127 / most, 0)).round()
    return (levels * (most / 127)).flatten(-2)
