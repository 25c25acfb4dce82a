"""The disk tier against plain sequential writes and reads of the same bytes, and its start with a million blocks."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kvstore.keys import BlockKey
from kvstore.store.bench.blocks import FINGERPRINT, chain, make_blocks
from kvstore.store.disk_tier import DiskTier, DiskWrite
from kvstore.transfer.checksum import block_checksum

_BLOCK_KIB = 360
_NUM_BLOCKS = 1024
_BATCH = 64
_MANY = 1_000_000
_MANY_BLOCK_BYTES = 64


@dataclass(frozen=True, slots=True)
class DiskResult:
    """Through the page cache on both sides, data on the disk at the end of each write; shares of the plain figure."""

    block_kib: int
    plain_write_gb_per_s: float
    plain_read_gb_per_s: float
    write_gb_per_s: float
    read_gb_per_s: float
    write_share: float
    read_share: float


@dataclass(frozen=True, slots=True)
class DiskStart:
    """Seconds until a tier that was left with so many blocks can be asked."""

    num_blocks: int
    with_indexes_s: float
    without_indexes_s: float


async def measure_disk(folder: Path) -> DiskResult:
    block_bytes = _BLOCK_KIB << 10
    data = make_blocks(_BATCH, block_bytes)
    keys = chain("disk", _NUM_BLOCKS)
    total = _NUM_BLOCKS * block_bytes
    plain = folder / "plain"
    began_s = time.perf_counter()
    fd = os.open(plain, os.O_RDWR | os.O_CREAT, 0o600)
    for start in range(0, _NUM_BLOCKS, _BATCH):
        os.pwrite(fd, data.data, start * block_bytes)
    os.fdatasync(fd)
    plain_write_s = time.perf_counter() - began_s
    _forget(fd)
    target = make_blocks(_BATCH, block_bytes)
    began_s = time.perf_counter()
    for start in range(0, _NUM_BLOCKS, _BATCH):
        os.preadv(fd, [target.data], start * block_bytes)
    plain_read_s = time.perf_counter() - began_s
    os.close(fd)
    plain.unlink()

    tier = DiskTier(folder / "disk", 4 * total, block_bytes, FINGERPRINT, 1)
    checksums = [block_checksum(block) for block in data]
    began_s = time.perf_counter()
    for start in range(0, _NUM_BLOCKS, _BATCH):
        parents: list[BlockKey | None] = [*keys[start - 1 : start], *keys[start:]] if start else [None, *keys]
        await tier.write(
            [
                DiskWrite(key, parent, checksum, block, "")
                for key, parent, checksum, block in zip(
                    keys[start : start + _BATCH], parents, checksums, data, strict=False
                )
            ]
        )
    tier.close()
    write_s = time.perf_counter() - began_s
    for path in (folder / "disk").glob("*.kv"):
        fd = os.open(path, os.O_RDWR)
        os.fdatasync(fd)
        _forget(fd)
        os.close(fd)
    tier = DiskTier(folder / "disk", 4 * total, block_bytes, FINGERPRINT, 2)
    began_s = time.perf_counter()
    for start in range(0, _NUM_BLOCKS, _BATCH):
        found = await tier.read(keys[start : start + _BATCH], list(target))
        if None in found:
            raise RuntimeError("a block is missing or wrong")
    read_s = time.perf_counter() - began_s
    tier.close()
    speeds = [total / seconds / 1e9 for seconds in (plain_write_s, plain_read_s, write_s, read_s)]
    plain_write, plain_read, write, read = speeds
    return DiskResult(
        _BLOCK_KIB,
        plain_write,
        plain_read,
        write,
        read,
        write_share=plain_write_s / write_s,
        read_share=plain_read_s / read_s,
    )


async def measure_start(folder: Path) -> DiskStart:
    block = np.zeros(_MANY_BLOCK_BYTES, np.uint8)
    checksum = block_checksum(block)
    budget = 2 * _MANY * (_MANY_BLOCK_BYTES + 128)
    tier = DiskTier(folder / "many", budget, _MANY_BLOCK_BYTES, FINGERPRINT, 1)
    keys = chain("many", _MANY)
    parent: BlockKey | None = None
    for start in range(0, _MANY, 512):
        writes = []
        for key in keys[start : start + 512]:
            writes.append(DiskWrite(key, parent, checksum, block, ""))
            parent = key
        await tier.write(writes)
    tier.close()
    del tier
    seconds = []
    for life in (2, 3):
        began_s = time.perf_counter()
        tier = DiskTier(folder / "many", budget, _MANY_BLOCK_BYTES, FINGERPRINT, life)
        seconds.append(time.perf_counter() - began_s)
        if len(tier) != _MANY:
            raise RuntimeError(f"{len(tier)} of {_MANY} blocks were found")
        tier.close()
        for path in (folder / "many").glob("*.idx"):
            path.unlink()
    return DiskStart(_MANY, *seconds)


def _forget(fd: int) -> None:
    """Read from the disk next time, not from memory."""
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
