"""Tensors of a GGUF file in the 8 or 4 bits that they are served in.

Q8_0, Q4_0 and Q4_1 as they are. Q4_K with the scale and the least value of each group, products of two numbers in the
file, rounded to float16. What has no such form (5 and 6 bits) is rounded to 8 bits anew.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from gguf import ReaderTensor
from gguf.quants import Q4_K, dequantize
from torch import Tensor

from pdserve.kernels.quantised import GROUP, Bits
from pdserve.models.quantise import Levels, quantise

_Bytes = np.ndarray[Any, np.dtype[np.uint8]]
_IN_4_BITS = ("Q4_0", "Q4_1", "Q4_K")
_DENSE = ("F32", "F16", "BF16")


def bits_of(type_name: str) -> Bits | None:
    """What a tensor of this type is kept in; None: dense."""
    if type_name in _DENSE:
        return None
    return 4 if type_name in _IN_4_BITS else 8


def levels(tensor: ReaderTensor) -> Levels:
    """Of a tensor that is kept in `bits_of` its type."""
    name = tensor.tensor_type.name
    columns, rows = (int(size) for size in tensor.shape)
    data = np.array(tensor.data).view(np.uint8).reshape(rows, -1)
    if name == "Q4_K":
        return _of_q4_k(data)
    if name == "Q8_0":
        blocks = data.reshape(rows, columns // GROUP, 2 + GROUP)
        values = torch.from_numpy(blocks[:, :, 2:].copy().view(np.int8)).short()
        return Levels(values.flatten(1), _halves(blocks[:, :, :2]))
    if name == "Q4_0":
        blocks = data.reshape(rows, columns // GROUP, 2 + GROUP // 2)
        scale = _halves(blocks[:, :, :2])
        return Levels(_nibbles(blocks[:, :, 2:]).flatten(1), torch.cat((scale, scale * -8), dim=-1))
    if name == "Q4_1":
        blocks = data.reshape(rows, columns // GROUP, 4 + GROUP // 2)
        return Levels(_nibbles(blocks[:, :, 4:]).flatten(1), _halves(blocks[:, :, :4]))
    return quantise(torch.from_numpy(dequantize(tensor.data, tensor.tensor_type)), 8)


def _of_q4_k(data: _Bytes) -> Levels:
    """Blocks of 256: two float16 factors, eight pairs of 6 bits in 12 bytes, then levels, two groups in 32 bytes."""
    rows = len(data)
    blocks = data.reshape(-1, 144)
    factors = _halves(blocks[:, :4]).float()  # [blocks, 2]
    scale, least = (torch.from_numpy(part.astype(np.float32)) for part in Q4_K.get_scale_min(blocks[:, 4:16]))
    pairs = torch.stack((scale * factors[:, :1], least * -factors[:, 1:]), dim=-1)  # [blocks, 8, 2]
    values = _nibbles(blocks[:, 16:].reshape(-1, 4, 32))  # [blocks, 4, 64]
    return Levels(values.reshape(rows, -1), pairs.half().view(rows, -1, 2))


def _nibbles(data: _Bytes) -> Tensor:
    """[..., n] -> [..., 2 n] int16: all low halves, then all high ones."""
    return torch.from_numpy(np.concatenate((data & 15, data >> 4), axis=-1)).short()


def _halves(data: _Bytes) -> Tensor:
    """[..., 2 n] -> [..., n] float16."""
    return torch.from_numpy(data.copy().view(np.float16))
