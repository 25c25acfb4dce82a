"""The pool's memory as transfer plane and store see it: one run of bytes per block, on the host or on a GPU."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvstore.transfer.checksum import block_checksum
from kvstore.transfer.transport import Buffer, DeviceBuffer, Memory

log = logging.getLogger(__name__)


class BlockMemory(Protocol):
    """All methods may be called from any thread, for blocks that no step is writing to; they return when it is done.

    Attributes:
        hashed_by: who computes checksums: "host", or "gpu" where the blocks lie there and it can.
    """

    block_bytes: int
    hashed_by: str

    def block(self, block_id: int) -> Memory:
        """`[block_bytes]`, writable: what a transport sends and receives into."""
        ...

    def whole(self) -> Memory:
        """All blocks, one behind the other."""
        ...

    def scratch(self, num_bytes: int) -> Memory:
        """New memory of the same kind, zeros."""
        ...

    def checksums(self, block_ids: Sequence[int]) -> Iterable[int]:
        """`block_checksum` of each block's bytes; a block may be sent as soon as its own is there."""
        ...

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
    hashed_by = "host"

    def __init__(self, pool: Tensor) -> None:
        flat: NDArray[np.uint8] = pool.view(torch.uint8).reshape(pool.shape[0], -1).numpy()
        self._blocks = flat
        self.block_bytes = flat.shape[1]

    def block(self, block_id: int) -> Buffer:
        view: Buffer = self._blocks[block_id]
        return view

    def whole(self) -> Buffer:
        return self._blocks.reshape(-1)

    def scratch(self, num_bytes: int) -> Buffer:
        return np.zeros(num_bytes, np.uint8)

    def checksums(self, block_ids: Sequence[int]) -> Iterable[int]:
        return (block_checksum(self._blocks[block_id]) for block_id in block_ids)

    def read(self, block_id: int, into: Buffer) -> int:
        np.copyto(into, self._blocks[block_id])
        return block_checksum(self._blocks[block_id])

    def write(self, block_id: int, data: Buffer) -> int:
        np.copyto(self._blocks[block_id], data)
        return block_checksum(self._blocks[block_id])


class DeviceBlocks:
    """Copies and checksums run on a stream of the calling thread's own, beside the steps; a copy is a plain DMA where
    the host's memory is pinned, as `PinnedArena` makes the store's. Where the GPU cannot hash, blocks are copied to the
    host for it, one by one.
    """

    def __init__(self, pool: Tensor) -> None:
        self._blocks = pool.view(torch.uint8).reshape(pool.shape[0], -1)
        self.block_bytes = self._blocks.shape[1]
        self._of_thread = threading.local()
        self._hash = _gpu_hash(self._blocks)
        self.hashed_by = "host" if self._hash is None else "gpu"

    def block(self, block_id: int) -> DeviceBuffer:
        return _buffer(self._blocks[block_id])

    def whole(self) -> DeviceBuffer:
        return _buffer(self._blocks)

    def scratch(self, num_bytes: int) -> DeviceBuffer:
        return _buffer(torch.zeros(num_bytes, dtype=torch.uint8, device=self._blocks.device))

    def checksums(self, block_ids: Sequence[int]) -> Iterable[int]:
        if self._hash is not None:
            with torch.cuda.stream(self._stream()):
                return self._hash(block_ids)
        own = self._of_thread
        if not hasattr(own, "pinned"):
            own.pinned = torch.empty(self.block_bytes, dtype=torch.uint8, pin_memory=True).numpy()
        return (self.read(block_id, own.pinned) for block_id in block_ids)

    def read(self, block_id: int, into: Buffer) -> int:
        self._copy(torch.from_numpy(into), self._blocks[block_id])
        return block_checksum(into)

    def write(self, block_id: int, data: Buffer) -> int:
        self._copy(self._blocks[block_id], torch.from_numpy(data))
        return block_checksum(data)

    def _copy(self, target: Tensor, source: Tensor) -> None:
        with torch.cuda.stream(self._stream()):
            target.copy_(source, non_blocking=True)
        self._stream().synchronize()

    def _stream(self) -> torch.cuda.Stream:
        own = self._of_thread
        if not hasattr(own, "stream"):
            own.stream = torch.cuda.Stream(self._blocks.device)  # type: ignore[no-untyped-call]
        stream: torch.cuda.Stream = own.stream
        return stream


def _gpu_hash(blocks: Tensor) -> Callable[[Sequence[int]], list[int]] | None:
    """Checksums on the GPU, tried out on a few bytes; None where that fails."""
    try:
        from pdserve.kernels.triton_checksum import BlockHasher

        sample = torch.randint(256, (2, blocks.shape[1]), dtype=torch.uint8)
        with torch.cuda.device(blocks.device):
            found = BlockHasher(sample.to(blocks.device))([1, 0])
        if found != [block_checksum(sample[block].numpy()) for block in (1, 0)]:
            raise ValueError("they are not those of the host")
        return BlockHasher(blocks)
    except Exception as error:  # Triton's compiler fails in ways of its own
        log.warning("checksums of blocks cannot be computed on the GPU, so each is copied to the host: %s", error)
        return None


def _buffer(tensor: Tensor) -> DeviceBuffer:
    """Keeps the tensor's memory."""
    return DeviceBuffer(tensor.data_ptr(), tensor.nbytes, tensor, tensor.device.index or 0)


class PinnedArena:
    """Pins the store's shared memory for the GPU; call it with the mapping, with the next one, or None when it goes."""

    def __init__(self) -> None:
        self._pinned: Buffer | None = None

    def __call__(self, arena: Buffer | None) -> None:
        runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        if self._pinned is not None:
            runtime.cudaHostUnregister(self._pinned.ctypes.data)
            self._pinned = None
        if arena is None:
            return
        status = int(runtime.cudaHostRegister(arena.ctypes.data, arena.nbytes, 0))
        self._pinned = arena if status == 0 else None
        if status != 0:
            log.warning("the store's memory could not be pinned (CUDA error %d): copies take a detour", status)
