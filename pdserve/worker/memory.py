"""The pool's memory as the transfer plane sees it: one run of bytes per block."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvstore.transfer.transport import Buffer


class BlockMemory:
    """Views into the pool tensor `[num_blocks, ...]`; the tensor outlives them."""

    def __init__(self, pool: Tensor) -> None:
        flat: NDArray[np.uint8] = pool.view(torch.uint8).reshape(pool.shape[0], -1).numpy()
        self._blocks = flat
        self.block_bytes = flat.shape[1]

    def block(self, block_id: int) -> Buffer:
        """uint8 `[block_bytes]`, writable."""
        view: Buffer = self._blocks[block_id]
        return view
