"""Compares an implementation with the reference on a few tokens: a miscompiled library must not serve a request."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from pdserve.kernels.base import AttentionKind, Kernels
from pdserve.kernels.quantised import Bits, QuantisedWeight, packed_shapes
from pdserve.kernels.reference import ReferenceKernels
from pdserve.kernels.scattered import scattered_batch

_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 4e-2}
_HEADS, _KV_HEADS, _DIM, _BLOCK_SIZE, _HIDDEN = 6, 2, 64, 16, 96
_CHUNKS = ((69, 1), (0, 37), (20, 5))  # a decode and two prefills: tokens already cached, tokens of this step


def check(kernels: Kernels) -> str | None:
    """What differs first, or None. Takes some milliseconds."""
    for dtype, tolerance in _TOLERANCE.items():
        pairs = zip(_outputs(kernels, dtype), _outputs(ReferenceKernels(), dtype), strict=True)
        for (operation, got), (_, expected) in pairs:
            if not torch.allclose(got.float(), expected.float(), rtol=tolerance, atol=tolerance):
                worst = (got.float() - expected.float()).abs().max().item()
                return f"{operation} in {dtype} is off by {worst:.2g}"
    return None


def _outputs(kernels: Kernels, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Each operation's name and result, on the same numbers every time."""
    rng = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng).to(dtype)

    x, weight = random(5, _HIDDEN), random(_HIDDEN)
    residual = random(5, _HIDDEN)
    yield "rms_norm", kernels.rms_norm(x, weight, 1e-5)
    yield "add_rms_norm", kernels.add_rms_norm(x, residual, weight, 1e-5)
    yield "residual", residual
    yield "silu_and_mul", kernels.silu_and_mul(x)
    yield "gelu_and_mul", kernels.gelu_and_mul(x)
    slices = x.clone()
    kernels.norm_slices(slices, 32, 2, weight[:32].contiguous(), 1e-5, 1.0)
    yield "norm_slices", slices
    yield "linear", kernels.linear(x, random(64, _HIDDEN) / 8, random(64))
    widths: tuple[Bits, ...] = (8, 4)
    for bits in widths:
        data, scales = packed_shapes((64, _HIDDEN), bits)
        weight_bytes = torch.randint(0, 256, data, generator=rng, dtype=torch.uint8)
        quantised = QuantisedWeight(weight_bytes, torch.rand(scales, generator=rng).half() / 2**bits)
        yield f"linear in {bits} bits", kernels.linear(x, quantised, random(64))

    batch, num_blocks = scattered_batch(_CHUNKS, _BLOCK_SIZE)
    qkv = random(len(batch.positions), (_HEADS + 2 * _KV_HEADS) * _DIM)
    pool = random(num_blocks, _KV_HEADS, 2, 2, _BLOCK_SIZE, _DIM)
    angles = torch.rand(128, _DIM // 2, generator=rng)
    kernels.rope_append(qkv, torch.cat((angles.cos(), angles.sin()), dim=1), batch, pool, 1, _HEADS)
    yield "rope_append", qkv
    yield "the pool", pool
    yield "attention", kernels.attention(qkv, batch, pool, 1, AttentionKind(_HEADS, _DIM**-0.5))
    yield "attention in a window", kernels.attention(qkv, batch, pool, 1, AttentionKind(_HEADS, _DIM**-0.5, 17, 2.0))
