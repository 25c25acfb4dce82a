"""Any device that torch knows, without a library of kernels: attention through scaled_dot_product_attention.

The fallback on CUDA where FlashInfer is not installed: right, and several times slower, since it gathers every context
and launches many small kernels.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from pdserve.kernels.base import AttentionKind, Batch
from pdserve.kernels.reference import ReferenceKernels


class SdpaKernels(ReferenceKernels):
    """The reference but for attention, which it computes per sequence in torch's fused kernel."""

    name = "sdpa"

    def attention(self, qkv: Tensor, batch: Batch, pool: Tensor, layer: int, kind: AttentionKind) -> Tensor:
        num_heads, scale, window, softcap = kind
        if softcap:  # torch's kernel has none
            return super().attention(qkv, batch, pool, layer, kind)
        kv_heads, block_size, head_dim = pool.shape[1], pool.shape[4], pool.shape[5]
        group = num_heads // kv_heads
        out = qkv.new_empty(qkv.shape[0], num_heads * head_dim)
        starts = batch.query_start.tolist()
        for sequence, context in enumerate(batch.context_len.tolist()):
            rows = slice(starts[sequence], starts[sequence + 1])
            count = rows.stop - rows.start
            blocks = pool[batch.block_tables[sequence, : -(-context // block_size)], :, layer]
            kv = blocks.permute(2, 1, 0, 3, 4).reshape(2, kv_heads, -1, head_dim)[:, :, :context].to(qkv.dtype)
            # Query heads of one kv head are folded into the query length, so K and V are read once.
            q = qkv[rows, : num_heads * head_dim].view(count, kv_heads, group, head_dim)
            q = q.permute(1, 2, 0, 3).reshape(kv_heads, group * count, head_dim)
            position = torch.arange(context - count, context, device=qkv.device).repeat(group).unsqueeze(1)
            key = torch.arange(context, device=qkv.device)
            seen = (key <= position) & (key > position - (window or context))
            attended = functional.scaled_dot_product_attention(q[None], kv[0, None], kv[1, None], seen, scale=scale)
            attended = attended[0].view(kv_heads, group, count, head_dim).permute(2, 0, 1, 3)
            out[rows] = attended.reshape(count, num_heads * head_dim)
        return out
