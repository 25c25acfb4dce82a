"""Blocks whose bytes follow from their key, so that a misplaced, stale or foreign one shows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kvstore.keys import BlockKey, block_keys, root_key
from kvstore.store.client import StoreClient
from kvstore.store.handles import Lease
from kvstore.transfer.checksum import block_checksum
from kvstore.transfer.transport import Buffer

FINGERPRINT = b"fingerprint-0000"
BLOCK_BYTES = 4096


def chain(seed: int, length: int, salt: bytes = b"") -> list[BlockKey]:
    return block_keys(root_key(FINGERPRINT, salt), range(seed * 1000, seed * 1000 + length), 1)


def entries(keys: Sequence[BlockKey]) -> list[tuple[BlockKey, BlockKey | None]]:
    return list(zip(keys, [None, *keys], strict=False))


def content(key: BlockKey, block_bytes: int = BLOCK_BYTES) -> Buffer:
    seed = int.from_bytes(key[:8], "little")
    return np.random.default_rng(seed).integers(0, 256, block_bytes, np.uint8)


async def attach(socket: str, owner: str = "worker") -> StoreClient:
    return await StoreClient.attach(socket, fingerprint=FINGERPRINT, block_bytes=BLOCK_BYTES, owner=owner)


async def save(client: StoreClient, keys: Sequence[BlockKey], tenant: str = "") -> int:
    """How many of the blocks were taken."""
    slots = [slot for slot in await client.begin_save(entries(keys), tenant) if slot is not None]
    for slot in slots:
        slot.data[:] = content(slot.key)
    await client.commit_save([(slot, block_checksum(slot.data)) for slot in slots])
    return len(slots)


def read(lease: Lease) -> list[str]:
    """Copy out and check all blocks of a lease, release it, and say where they were."""
    with lease:
        for block in lease.blocks:
            copy = block.data.copy()
            assert block_checksum(copy) == block.checksum
            assert np.array_equal(copy, content(block.key))
        return [block.tier.label for block in lease.blocks]
