"""Batches whose blocks lie in no order, to check kernels with."""

from __future__ import annotations

import torch

from pdserve.kernels.base import Batch


def scattered_batch(chunks: tuple[tuple[int, int], ...], block_size: int) -> tuple[Batch, int]:
    """One sequence for each (cached tokens, new tokens), and the number of blocks of all; the same for the same."""
    counts = [-(-(cached + tokens) // block_size) for cached, tokens in chunks]
    free = torch.randperm(sum(counts), generator=torch.Generator().manual_seed(0)).tolist()
    tables = torch.zeros(len(chunks), max(counts), dtype=torch.int32)
    for row, count in zip(tables, counts, strict=True):
        row[:count] = torch.tensor([free.pop() for _ in range(count)])
    batch = Batch(
        positions=torch.cat([torch.arange(cached, cached + tokens) for cached, tokens in chunks]).int(),
        query_start=torch.tensor([0, *(tokens for _, tokens in chunks)]).cumsum(0).int(),
        context_len=torch.tensor([cached + tokens for cached, tokens in chunks]).int(),
        block_tables=tables,
        max_query_len=max(tokens for _, tokens in chunks),
    )
    return batch, sum(counts)
