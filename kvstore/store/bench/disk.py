"""The disk tier against plain sequential writes and reads of the same bytes, and its start with a million blocks."""

from __future__ import annotations

import os
import shutil
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kvstore.keys import BlockKey
from kvstore.store.bench.blocks import FINGERPRINT, Blocks, chain, make_blocks
from kvstore.store.disk_tier import DiskTier
from kvstore.store.segment_file import DiskWrite
from kvstore.transfer.checksum import block_checksum

_BLOCK_KIB = 360
_NUM_BLOCKS = 1024
_BATCH = 64
_ROUNDS = 5
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
    """In turn, as a disk is not as fast in one second as in the next."""
    data, target = (make_blocks(_BATCH, _BLOCK_KIB << 10) for _ in range(2))
    rounds = []
    for n in range(_ROUNDS):
        plain = _plain(folder / f"plain {n}", data, target)
        rounds.append((*plain, *await _tier(folder / f"disk {n}", data, target)))
    total = _NUM_BLOCKS * (_BLOCK_KIB << 10)
    plain_write, plain_read, write, read = (total / statistics.median(times_s) / 1e9 for times_s in zip(*rounds))  # noqa: B905
    write_share, read_share = (
        statistics.median(row[plain] / row[ours] for row in rounds) for plain, ours in ((0, 2), (1, 3))
    )
    return DiskResult(_BLOCK_KIB, plain_write, plain_read, write, read, write_share, read_share)


def _plain(path: Path, data: Blocks, target: Blocks) -> tuple[float, float]:
    """Seconds to write and to read."""
    began_s = time.perf_counter()
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    for start in range(0, _NUM_BLOCKS, _BATCH):
        os.pwrite(fd, data.data, start * data.shape[1])
    os.fdatasync(fd)
    write_s = time.perf_counter() - began_s
    _forget(fd)
    began_s = time.perf_counter()
    for start in range(0, _NUM_BLOCKS, _BATCH):
        os.preadv(fd, [target.data], start * data.shape[1])
    read_s = time.perf_counter() - began_s
    os.close(fd)
    path.unlink()
    return write_s, read_s


async def _tier(folder: Path, data: Blocks, target: Blocks) -> tuple[float, float]:
    """Seconds to write and to read, the index and the verification of each block included."""
    keys = chain("disk", _NUM_BLOCKS)
    checksums = [block_checksum(block) for block in data]
    writes = [
        DiskWrite(key, parent, checksums[n % _BATCH], data[n % _BATCH], "")
        for n, (key, parent) in enumerate(zip(keys, [None, *keys], strict=False))
    ]
    budget = 4 * _NUM_BLOCKS * data.shape[1]
    tier = DiskTier(folder, budget, data.shape[1], FINGERPRINT, 1)
    began_s = time.perf_counter()
    for start in range(0, _NUM_BLOCKS, _BATCH):
        await tier.write(writes[start : start + _BATCH])
    tier.close()
    write_s = time.perf_counter() - began_s
    _forget_all(folder)
    tier = DiskTier(folder, budget, data.shape[1], FINGERPRINT, 2)
    began_s = time.perf_counter()
    for start in range(0, _NUM_BLOCKS, _BATCH):
        if None in await tier.read(keys[start : start + _BATCH], list(target)):
            raise RuntimeError("a block is missing or wrong")
    read_s = time.perf_counter() - began_s
    tier.close()
    del tier
    shutil.rmtree(folder)
    return write_s, read_s


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


def _forget_all(folder: Path) -> None:
    for path in folder.glob("*.kv"):
        fd = os.open(path, os.O_RDWR)
        _forget(fd)
        os.close(fd)
