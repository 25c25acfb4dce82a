"""The pool's memory as transfer plane and store see it: one run of bytes per block, on the host or on a GPU."""

from __future__ import annotations

import threading
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvstore.transfer.checksum import block_checksum
from kvstore.transfer.transport import Buffer, DeviceBuffer, Memory


class BlockMemory(Protocol):
    """All methods may be called from any thread, for blocks that no step is writing to; they return when it is done."""

    block_bytes: int

    def block(self, block_id: int) -> Memory:
        """`[block_bytes]`, writable: what a transport sends and receives into."""
        ...

    def checksum(self, block_id: int) -> int: ...

    def read(self, block_id: int, into: Buffer) -> int:
        """Copy the block to host memory; returns the checksum of the block."""
        ...

    def write(self, block_id: int, data: Buffer) -> int:
        """Copy host memory to the block; returns the checksum of what was written."""
        ...


def block_memory(pool: Tensor) -> BlockMemory:
    """Views into the pool tensor `[num_blocks, ...]`; the tensor outlives them."""
    return HostBlocks(pool) if pool.device.type == "cpu" else DeviceBlocks(pool)


class HostBlocks:
    def __init__(self, pool: Tensor) -> None:
        flat: NDArray[np.uint8] = pool.view(torch.uint8).reshape(pool.shape[0], -1).numpy()
        self._blocks = flat
        self.block_bytes = flat.shape[1]

    def block(self, block_id: int) -> Buffer:
        view: Buffer = self._blocks[block_id]
        return view

    def checksum(self, block_id: int) -> int:
        return block_checksum(self._blocks[block_id])

    def read(self, block_id: int, into: Buffer) -> int:
        np.copyto(into, self._blocks[block_id])
        return self.checksum(block_id)

    def write(self, block_id: int, data: Buffer) -> int:
        np.copyto(self._blocks[block_id], data)
        return self.checksum(block_id)


class DeviceBlocks:
    """Copies go through one pinned block a thread, on a stream of the thread's own: beside the steps, not between."""

    def __init__(self, pool: Tensor) -> None:
        self._blocks = pool.view(torch.uint8).reshape(pool.shape[0], -1)
        self.block_bytes = self._blocks.shape[1]
        self._of_thread = threading.local()

    def block(self, block_id: int) -> DeviceBuffer:
        return DeviceBuffer(self._blocks[block_id].data_ptr(), self.block_bytes, self._blocks)

    def checksum(self, block_id: int) -> int:
        return block_checksum(self._fetched(block_id))

    def read(self, block_id: int, into: Buffer) -> int:
        fetched = self._fetched(block_id)
        np.copyto(into, fetched)
        return block_checksum(fetched)

    def write(self, block_id: int, data: Buffer) -> int:
        pinned, stream = self._own()
        np.copyto(pinned.numpy(), data)
        with torch.cuda.stream(stream):
            self._blocks[block_id].copy_(pinned, non_blocking=True)
        stream.synchronize()
        return block_checksum(pinned.numpy())

    def _fetched(self, block_id: int) -> Buffer:
        """The thread's pinned block, until its next call."""
        pinned, stream = self._own()
        with torch.cuda.stream(stream):
            pinned.copy_(self._blocks[block_id], non_blocking=True)
        stream.synchronize()
        fetched: Buffer = pinned.numpy()
        return fetched

    def _own(self) -> tuple[Tensor, torch.cuda.Stream]:
        own = self._of_thread
        if not hasattr(own, "pinned"):
            own.pinned = torch.empty(self.block_bytes, dtype=torch.uint8, pin_memory=True)
            own.stream = torch.cuda.Stream(self._blocks.device)  # type: ignore[no-untyped-call]
        return own.pinned, own.stream
