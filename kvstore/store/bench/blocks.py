"""Keys and bytes to measure with, and the plain copy to judge by."""

from __future__ import annotations

import asyncio
import mmap
import statistics
import time
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from kvstore.keys import BlockKey, block_keys, root_key
from kvstore.store.client import StoreClient
from kvstore.transfer.checksum import block_checksum

FINGERPRINT = b"store benchmark."
Blocks = NDArray[np.uint8]  # [num_blocks, block_bytes]


def chain(name: str, length: int) -> list[BlockKey]:
    return block_keys(root_key(FINGERPRINT, name.encode()), range(length), 1)


def make_blocks(num_blocks: int, block_bytes: int) -> Blocks:
    """All pages touched, and like a worker's pool: whole pages, huge ones where the system has them.

    Memory of malloc begins 16 bytes behind a page: copies between it and the arena, whose slots are whole pages, run at
    half the speed.
    """
    memory = mmap.mmap(-1, num_blocks * block_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    blocks = np.frombuffer(memory, np.uint8).reshape(num_blocks, block_bytes)
    blocks[:] = np.arange(block_bytes, dtype=np.uint32).astype(np.uint8)
    return blocks


def memcpy_gb_per_s(source: Blocks, target: Blocks, rounds: int) -> float:
    """Median of copying block by block."""
    times_s = []
    for _ in range(rounds):
        began_s = time.perf_counter()
        for n in range(len(source)):
            np.copyto(target[n], source[n])
        times_s.append(time.perf_counter() - began_s)
    return source.nbytes / statistics.median(times_s) / 1e9


async def put(client: StoreClient, keys: Sequence[BlockKey], source: Blocks, *, until_found: bool = True) -> None:
    """What a worker does to save: reserve, copy, checksum, publish. Raises RuntimeError if a block was not taken.

    A worker does not wait until others find the blocks.
    """
    saved = []
    slots = await client.begin_save(list(zip(keys, [None, *keys], strict=False)))
    for n, slot in enumerate(slots):
        if slot is None:
            raise RuntimeError("the store took a block not")
        np.copyto(slot.data, source[n])
        saved.append((slot, block_checksum(source[n])))
    if until_found:
        await client.commit_save(saved)
    else:
        client.publish(saved)


async def get(client: StoreClient, keys: Sequence[BlockKey], target: Blocks, deadline_s: float = 5.0) -> None:
    """What a worker does to load: lease, copy, verify, release. Raises RuntimeError if a block is missing or wrong."""
    lease = await client.load(keys, deadline_s)
    if len(lease.blocks) != len(keys):
        raise RuntimeError(f"the store gave {len(lease.blocks)} of {len(keys)} blocks")
    for n, block in enumerate(lease.blocks):
        np.copyto(target[n], block.data)
        if block_checksum(target[n]) != block.checksum:
            raise RuntimeError("a block came with wrong bytes")
    lease.release()
    await asyncio.sleep(0)  # a turn of the loop, in which that is told
