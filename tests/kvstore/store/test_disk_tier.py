"""The disk tier: what it gives back is right, private, within its budget, and there again after a restart."""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from kvstore.errors import Unavailable
from kvstore.keys import BlockKey
from kvstore.store import disk_tier
from kvstore.store.breaker import Breaker, BreakerState
from kvstore.store.disk_tier import DiskTier, check_disk
from kvstore.store.segment import HEADER_BYTES, PAGE_BYTES
from kvstore.store.segment_file import DiskWrite, OsCalls
from kvstore.transfer.checksum import block_checksum
from tests.kvstore.store.blocks import FINGERPRINT, chain, content

BLOCK_BYTES = 512
RECORDS = 4
SEGMENT_BYTES = PAGE_BYTES + RECORDS * (HEADER_BYTES + BLOCK_BYTES)


class Disk:
    """Opens tiers on one folder, one after the other."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.life = 0
        self.tier: DiskTier | None = None

    def open(self, *, segments: int = 4, fingerprint: bytes = FINGERPRINT, **options: Any) -> DiskTier:
        self.close()
        self.life += 1
        budget = segments * SEGMENT_BYTES
        options = {"segment_bytes": SEGMENT_BYTES, **options}
        self.tier = DiskTier(self.folder, budget, BLOCK_BYTES, fingerprint, self.life, **options)
        return self.tier

    def close(self) -> None:
        if self.tier is not None:
            self.tier.close()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    opened = Disk(tmp_path / "disk")
    yield opened
    opened.close()


def writes(keys: Sequence[BlockKey], tenant: str = "") -> list[DiskWrite]:
    blocks = [content(key, BLOCK_BYTES) for key in keys]
    return [
        DiskWrite(key, parent, block_checksum(block), block, tenant)
        for key, parent, block in zip(keys, [None, *keys], blocks, strict=False)
    ]


async def readable(tier: DiskTier, keys: Sequence[BlockKey]) -> list[bool]:
    buffers = [np.zeros(BLOCK_BYTES, np.uint8) for _ in keys]
    checksums = await tier.read(keys, buffers)
    for key, buffer, checksum in zip(keys, buffers, checksums, strict=True):
        assert checksum is None or np.array_equal(buffer, content(key, BLOCK_BYTES))
    return [checksum is not None for checksum in checksums]


async def test_blocks_survive_a_restart_with_and_without_side_indexes(disk: Disk) -> None:
    keys = chain(1, 10)
    assert await disk.open().write(writes(keys, "tenant")) == 10
    tier = disk.open()
    assert len(list(disk.folder.glob("*.idx"))) == 3
    assert await readable(tier, keys) == [True] * 10
    disk.close()
    for path in disk.folder.glob("*.idx"):
        path.unlink()
    tier = disk.open()
    assert await readable(tier, keys) == [True] * 10
    assert tier.parent(keys[3]) == keys[2]
    assert tier.tenant(keys[3]) == "tenant"


async def test_writing_goes_on_while_a_full_segment_is_made_last(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first segment goes for room, a block of the third is dropped, before the disk has taken any of them."""
    taken = threading.Event()
    monkeypatch.setattr(os, "fdatasync", lambda fd: taken.wait(20.0))
    tier = disk.open(segments=3)
    try:
        for seed in range(4):
            assert await tier.write(writes(chain(seed, RECORDS))) == RECORDS
        assert await readable(tier, chain(3, RECORDS)) == [True] * RECORDS
        assert tier.drop(chain(2, RECORDS)[3:]) == 1
    finally:
        taken.set()
    tier = disk.open(segments=3)
    names = {path.stem for path in disk.folder.glob("*.kv")}
    assert {path.stem for path in disk.folder.glob("*.idx")} < names, "no index of a segment that went"
    held = [[key in tier for key in chain(seed, RECORDS)] for seed in range(4)]
    assert held == [[False] * 4, [True] * 4, [True] * 3 + [False], [True] * 4]


async def test_a_damaged_side_index_is_not_believed(disk: Disk) -> None:
    keys = chain(1, 4)
    await disk.open().write(writes(keys))
    disk.close()
    (path,) = disk.folder.glob("*.idx")
    data = bytearray(path.read_bytes())
    data[60] ^= 1
    path.write_bytes(data)
    assert await readable(disk.open(), keys) == [True] * 4


async def test_a_torn_record_is_not_there(disk: Disk) -> None:
    keys = chain(1, 3)
    await disk.open().write(writes(keys))
    disk.close()
    (path,) = disk.folder.glob("*.kv")
    os.truncate(path, path.stat().st_size - 1)
    tier = disk.open()
    assert [key in tier for key in keys] == [True, True, False]


async def test_a_flipped_bit_drops_the_block_and_what_follows_it(disk: Disk) -> None:
    keys = chain(1, 4)
    await disk.open().write(writes(keys))
    tier = disk.open()
    (path,) = disk.folder.glob("*.kv")
    with path.open("r+b") as file:
        file.seek(PAGE_BYTES + HEADER_BYTES + BLOCK_BYTES + HEADER_BYTES + 7)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 4]))
    assert await readable(tier, keys[:2]) == [True, False]
    assert [key in tier for key in keys] == [True, False, False, False]
    tier = disk.open()
    assert [key in tier for key in keys] == [True, False, False, False], "not in the next life either"


async def test_a_foreign_model_is_never_served_and_makes_room(disk: Disk) -> None:
    await disk.open().write(writes(chain(1, 8)))
    tier = disk.open(fingerprint=b"another model...")
    assert len(tier) == 0
    assert await readable(tier, chain(1, 2)) == [False, False]
    for seed in range(2, 8):
        await tier.write(writes(chain(seed, 4)))
        assert tier.file_bytes <= 4 * SEGMENT_BYTES
    assert len(list(disk.folder.glob("*.kv"))) == 4


async def test_the_least_recently_used_segment_goes_with_what_follows_its_blocks(disk: Disk) -> None:
    tier = disk.open(segments=3)
    long = chain(1, 6)  # two segments, the second with room for two more
    assert await tier.write(writes(long)) == 6
    assert await tier.write(writes(chain(2, 2))) == 2
    assert await tier.write(writes(chain(3, 4))) == 4
    tier.touch([*chain(2, 2), *chain(3, 4)])
    assert await tier.write(writes(chain(4, 1))) == 1
    assert [key in tier for key in long] == [False] * 6
    assert await readable(tier, [*chain(2, 2), *chain(3, 4)]) == [True] * 6
    assert sum(path.stat().st_size for path in disk.folder.glob("*.kv")) <= 3 * SEGMENT_BYTES


class Full(OsCalls):
    full = False

    def pwritev(self, fd: int, buffers: Sequence[Any], offset: int) -> int:
        if self.full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().pwritev(fd, buffers, offset)


async def test_a_full_disk_opens_the_breaker_and_reading_goes_on(disk: Disk) -> None:
    calls = Full()
    tier = disk.open(calls=calls)
    assert await tier.write(writes(chain(1, 2))) == 2
    calls.full = True
    assert await tier.write(writes(chain(2, 2))) == 0
    assert tier.breaker is BreakerState.OPEN
    assert not tier.accepts_writes
    calls.full = False
    assert await tier.write(writes(chain(3, 2))) == 0, "the disk is left alone for a while"
    assert await readable(tier, chain(1, 2)) == [True, True]


@pytest.mark.parametrize("begins", [True, False])
async def test_a_disk_that_stays_full_takes_room_for_one_segment_from_what_is_there(
    disk: Disk, monkeypatch: pytest.MonkeyPatch, begins: bool
) -> None:
    """However often it is tried; `begins`: a new file's first page can still be written."""
    calls = Full()
    tier = disk.open(calls=calls)
    for seed in range(4):
        assert await tier.write(writes(chain(seed, RECORDS))) == RECORDS
    pwrite = os.pwrite

    def full_pwrite(fd: int, data: bytes, offset: int) -> int:
        if calls.full and not begins:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwrite(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", full_pwrite)
    calls.full = True
    for hour in range(10):
        monkeypatch.setattr(disk_tier, "time", SimpleNamespace(monotonic=lambda now_s=1e6 + 3600 * hour: now_s))
        assert await tier.write(writes(chain(10 + hour, 2))) == 0
        assert tier.breaker is BreakerState.OPEN
    assert len(list(disk.folder.glob("*.kv"))) == 3
    assert [key in tier for seed in range(1, 4) for key in chain(seed, RECORDS)] == [True] * 3 * RECORDS
    calls.full = False
    monkeypatch.setattr(disk_tier, "time", SimpleNamespace(monotonic=lambda: 2e6))
    assert await tier.write(writes(chain(30, 2))) == 2
    assert await readable(tier, [*chain(30, 2), *chain(3, RECORDS)]) == [True] * (2 + RECORDS)


async def test_failing_reads_are_misses_and_then_not_even_tried(disk: Disk) -> None:
    class Broken(OsCalls):
        calls = 0

        def preadv(self, fd: int, buffers: Sequence[Any], offset: int) -> int:
            self.calls += 1
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    calls = Broken()
    tier = disk.open(calls=calls)
    keys = chain(1, 2)
    await tier.write(writes(keys))
    for _ in range(5):
        assert await readable(tier, keys) == [False, False]
    assert calls.calls == 3
    assert keys[0] not in tier


async def test_a_tenant_over_its_quota_is_not_written(disk: Disk) -> None:
    tier = disk.open(tenant_bytes=2 * BLOCK_BYTES)
    assert await tier.write(writes(chain(1, 2), "a")) == 2
    assert await tier.write(writes(chain(2, 1), "a")) == 0
    assert await tier.write(writes(chain(3, 2), "b")) == 2
    assert await tier.write(writes(chain(4, 3))) == 3


async def test_files_are_private_and_the_folder_is_one_nodes(disk: Disk) -> None:
    await disk.open().write(writes(chain(1, 5)))
    assert stat.S_IMODE(disk.folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in disk.folder.iterdir()} == {0o600}
    with pytest.raises(Unavailable, match="another store node uses"):
        DiskTier(disk.folder, 4 * SEGMENT_BYTES, BLOCK_BYTES, FINGERPRINT, 9, segment_bytes=SEGMENT_BYTES)


async def test_a_link_in_the_place_of_a_segment_is_not_followed(disk: Disk, tmp_path: Path) -> None:
    await disk.open().write(writes(chain(1, 2)))
    disk.close()
    (path,) = disk.folder.glob("*.kv")
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    assert len(disk.open()) == 0


def test_a_link_in_the_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(Unavailable, match="a folder of its own"):
        DiskTier(tmp_path / "link", 4 * SEGMENT_BYTES, BLOCK_BYTES, FINGERPRINT, 1, segment_bytes=SEGMENT_BYTES)


def test_a_folder_that_cannot_be_one_is_told_before_there_are_blocks(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"mine")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(Unavailable, match=r"cannot use .*: name another --disk-path"):
            check_disk(path, 4 * SEGMENT_BYTES)
    assert (tmp_path / "file").read_bytes() == b"mine"


@pytest.mark.parametrize("budget", [4 * SEGMENT_BYTES, 8 << 30])
def test_a_new_tier_needs_room_for_one_of_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, budget: int
) -> None:
    least_bytes = min(budget // 4, 256 << 20)
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_bavail=least_bytes, f_frsize=1))
    check_disk(tmp_path / "disk", budget)
    assert "rests whenever the disk is full" in caplog.text
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_bavail=least_bytes - 1, f_frsize=1))
    with pytest.raises(Unavailable, match="make room, or give it fewer --disk-bytes"):
        check_disk(tmp_path / "disk", budget)


async def test_a_tier_that_has_filled_its_disk_can_be_had_again(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    await disk.open().write(writes(chain(1, RECORDS)))
    disk.close()
    _fail_writes(monkeypatch, errno.ENOSPC)
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_bavail=0, f_frsize=1))
    check_disk(disk.folder, 4 * SEGMENT_BYTES)
    assert len(disk.open()) == RECORDS, "looking took nothing away"
    assert not (disk.folder / "probe").exists()


def test_a_disk_that_takes_no_byte_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _fail_writes(monkeypatch, errno.EIO)
    with pytest.raises(Unavailable, match=r"cannot write to .*Input/output error"):
        check_disk(tmp_path / "disk", 4 * SEGMENT_BYTES)


def _fail_writes(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def fail(self: Path, data: bytes) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "write_bytes", fail)


def test_a_breaker_tries_again_after_a_pause_that_grows() -> None:
    breaker = Breaker(max_failures=2, pause_s=1.0, max_pause_s=3.0)
    breaker.failed(0.0)
    assert breaker.allows(0.0)
    breaker.failed(0.0)
    assert not breaker.allows(0.9)
    assert breaker.allows(1.0)
    assert not breaker.allows(1.0), "one at a time"
    breaker.failed(1.0)
    assert not breaker.allows(2.9)
    assert breaker.allows(3.0)
    breaker.succeeded()
    assert breaker.allows(3.0)
    assert breaker.state is BreakerState.CLOSED
