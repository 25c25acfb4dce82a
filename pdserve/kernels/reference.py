"""The kernels in plain torch: the truth that every other implementation is compared with.

Written to be obviously right: one sequence at a time, scores written out in full, all arithmetic in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from pdserve.kernels.base import AttentionKind, Batch, Weight
from pdserve.kernels.quantised import QuantisedWeight, rounded


class ReferenceKernels:
    """`pdserve.kernels.base.Kernels` on any device and for any floating dtype."""

    name = "reference"

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
        return (wide * scale * (weight.float() + offset)).to(x.dtype)

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
        residual += x
        return self.rms_norm(residual, weight, eps, offset)

    def norm_slices(self, x: Tensor, begin: int, count: int, weight: Tensor, eps: float, offset: float = 0.0) -> None:
        size = weight.shape[0]
        slices = x[:, begin : begin + count * size].view(-1, count, size)
        slices.copy_(self.rms_norm(slices, weight, eps, offset))

    def rope_append(self, qkv: Tensor, cos_sin: Tensor, batch: Batch, pool: Tensor, layer: int, num_heads: int) -> None:
        num_kv_heads, block_size, head_dim = pool.shape[1], pool.shape[4], pool.shape[5]
        heads = qkv.view(-1, num_heads + 2 * num_kv_heads, head_dim)
        rotated = heads[:, : num_heads + num_kv_heads, : cos_sin.shape[1]]
        cos, sin = cos_sin[batch.positions].unsqueeze(1).chunk(2, dim=-1)  # [T, 1, D / 2] each
        first, second = rotated.float().chunk(2, dim=-1)
        rotated.copy_(torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1))

        query_len = batch.query_start.diff()
        sequence = torch.repeat_interleave(torch.arange(len(query_len), device=qkv.device), query_len)  # [T]
        block = batch.block_tables[sequence, batch.positions // block_size]
        slot = batch.positions % block_size
        _, k, v = torch.tensor_split(heads, (num_heads, num_heads + num_kv_heads), dim=1)
        pool[block, :, layer, 0, slot] = k.to(pool.dtype)
        pool[block, :, layer, 1, slot] = v.to(pool.dtype)

    def attention(self, qkv: Tensor, batch: Batch, pool: Tensor, layer: int, kind: AttentionKind) -> Tensor:
        head_dim = pool.shape[5]
        out = qkv.new_empty(qkv.shape[0], kind.num_heads * head_dim)
        starts = batch.query_start.tolist()
        for sequence, context_len in enumerate(batch.context_len.tolist()):
            rows = slice(starts[sequence], starts[sequence + 1])
            q = qkv[rows, : kind.num_heads * head_dim].view(-1, kind.num_heads, head_dim)
            k, v = _gather(pool, batch.block_tables[sequence], layer, context_len)
            out[rows] = _attend(q, k, v, kind.scale, kind.window or context_len, kind.softcap).flatten(1)
        return out

    def linear(self, x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
        if isinstance(weight, QuantisedWeight):
            product = functional.linear(rounded(x), weight.values(), None if bias is None else bias.float())
            return product.to(x.dtype)
        return functional.linear(x, weight, bias)

    def silu_and_mul(self, x: Tensor) -> Tensor:
        gate, up = x.float().chunk(2, dim=-1)
        return (functional.silu(gate) * up).to(x.dtype)

    def gelu_and_mul(self, x: Tensor) -> Tensor:
        gate, up = x.float().chunk(2, dim=-1)
        return (functional.gelu(gate, approximate="tanh") * up).to(x.dtype)


def _gather(pool: Tensor, block_table: Tensor, layer: int, context_len: int) -> tuple[Tensor, Tensor]:
    """K and V of one sequence in the order of its tokens, [Hkv, context, D] float32 each."""
    num_kv_heads, block_size, head_dim = pool.shape[1], pool.shape[4], pool.shape[5]
    num_blocks = -(-context_len // block_size)
    blocks = pool[block_table[:num_blocks], :, layer]  # [blocks, Hkv, 2, block_size, D]
    kv = blocks.permute(2, 1, 0, 3, 4).reshape(2, num_kv_heads, num_blocks * block_size, head_dim)
    k, v = kv[:, :, :context_len].float()
    return k, v


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int, softcap: float) -> Tensor:
    """q [rows, Hq, D] are the last tokens of the context of k and v [Hkv, context, D] -> [rows, Hq, D].

    The query heads that share a KV head are folded into the query length, so K and V are never repeated.
    """
    rows, num_heads, head_dim = q.shape
    num_kv_heads, context_len, _ = k.shape
    group = num_heads // num_kv_heads
    folded = q.float().view(rows, num_kv_heads, group, head_dim).permute(1, 2, 0, 3).reshape(num_kv_heads, -1, head_dim)
    scores = folded @ k.transpose(1, 2) * scale  # [Hkv, group * rows, context]
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    position = torch.arange(context_len - rows, context_len, device=q.device).repeat(group).unsqueeze(1)
    key = torch.arange(context_len, device=q.device)
    hidden = (key > position) | (key <= position - window)
    weights = scores.masked_fill(hidden, float("-inf")).softmax(dim=-1)
    out = (weights @ v).view(num_kv_heads, group, rows, head_dim)
    return out.permute(2, 0, 1, 3).reshape(rows, num_heads, head_dim).to(q.dtype)
