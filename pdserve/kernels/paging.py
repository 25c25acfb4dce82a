"""The block tables of a batch in the form that paged-attention libraries read: one list of blocks, and where each
sequence's begin in it (CSR)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pdserve.kernels.base import Batch

Ints = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Pages:
    """On the host, int32."""

    query_start: Ints  # as the batch's
    indptr: Ints  # [sequences + 1]: sequence s owns indices[indptr[s] : indptr[s + 1]]
    indices: Ints  # [indptr[-1]] block ids
    last_page_len: Ints  # [sequences], tokens in the last of its blocks, 1 to block_size
    sequence: Ints  # [tokens]: whose each row of the batch is


def pages_of(batch: Batch, block_size: int) -> Pages:
    """`batch` lies on the CPU."""
    context, tables = batch.context_len.numpy(), batch.block_tables.numpy()
    counts = -(-context // block_size)
    query_start = batch.query_start.numpy()
    return Pages(
        query_start=query_start,
        indptr=np.concatenate(([0], counts.cumsum())).astype(np.int32),
        indices=tables[np.arange(tables.shape[1]) < counts[:, None]],
        last_page_len=((context - 1) % block_size + 1).astype(np.int32),
        sequence=np.repeat(np.arange(len(context), dtype=np.int32), np.diff(query_start)),
    )
