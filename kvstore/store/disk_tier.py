"""The disk tier: segment files in a folder, an index in memory, reads and writes in threads of its own.

    FOLDER/lock    segment-<id>.kv    segment-<id>.idx (of a sealed one; optional)

A life of the node begins a new segment; one that is full is sealed and gets its side index. Room is made by removing
whole segments, the least recently used first: that writes nothing, leaves no holes and costs one unlink, and blocks of
one prompt, which are in demand together, were written together. (Compaction would keep a hot block of a cold segment by
writing it again, which wears the disk that this tier is meant to spare.)

Nothing is synced but a sealed segment: after a crash of the machine a record may be torn, which its size or its
checksum tells when it is read. An error of the disk opens a breaker: reads miss, writes are refused, serving goes on.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from kvstore.errors import Unavailable
from kvstore.keys import BlockKey
from kvstore.store.breaker import Breaker, BreakerState
from kvstore.store.disk_folder import check_writable, claim, remove_segment, segment_id_of, segment_paths
from kvstore.store.disk_index import DiskIndex
from kvstore.store.segment import (
    HEADER_BYTES,
    PAGE_BYTES,
    BadSegment,
    SegmentInfo,
    encode_header,
    tenant_field,
)
from kvstore.store.segment_file import DiskCalls, DiskWrite, OsCalls, SegmentFile, read_blocks, write_blocks
from kvstore.transfer.transport import Buffer

log = logging.getLogger(__name__)

_SEGMENT_BYTES = 256 << 20
_MAX_VECTORS = 1024  # IOV_MAX
_READ_BLOCKS = 64  # of one thread's turn


def check_disk(folder: Path, budget_bytes: int) -> None:
    """Before a block's size is known: whether a tier could be had. Raises Unavailable, one sentence that says why."""
    room_bytes = check_writable(folder, _segment_bytes(budget_bytes))
    if room_bytes < budget_bytes:
        log.warning(
            "%s has room for %d MiB of the disk tier's %d: it rests whenever the disk is full",
            folder,
            room_bytes >> 20,
            budget_bytes >> 20,
        )


def _segment_bytes(budget_bytes: int) -> int:
    return min(_SEGMENT_BYTES, budget_bytes // 4)


class DiskTier:
    """Use on the node's loop. Making one reads the indexes of all segments: do it in a thread."""

    def __init__(
        self,
        folder: Path,
        budget_bytes: int,
        block_bytes: int,
        fingerprint: bytes,
        generation: int,
        *,
        tenant_bytes: int = 0,
        segment_bytes: int | None = None,
        calls: DiskCalls | None = None,
    ) -> None:
        """Raises Unavailable: the folder cannot be used; one sentence that says why."""
        wanted = segment_bytes or _segment_bytes(budget_bytes)
        stride = HEADER_BYTES + block_bytes
        self._records = (wanted - PAGE_BYTES) // stride
        if self._records < 1:
            raise Unavailable(f"a disk tier of {budget_bytes} bytes is too small for blocks of {block_bytes} bytes")
        self.block_bytes = block_bytes
        self.capacity_bytes = budget_bytes
        self.evictions = 0
        self._folder = folder
        self._fingerprint = fingerprint
        self._generation = generation
        self._segment_bytes = PAGE_BYTES + self._records * stride
        self._num_seats = max(2, budget_bytes // self._segment_bytes)
        self._tenant_blocks = tenant_bytes // block_bytes if tenant_bytes else 0
        self._index = DiskIndex(self._num_seats, self._records)
        self._segments: dict[int, SegmentFile] = {}  # by seat
        self._foreign: list[tuple[Path, int]] = []  # of another model, with their bytes; first to go
        self._current: SegmentFile | None = None
        self._last_id = 0
        self._calls = calls or OsCalls()
        self._write_breaker = Breaker(1, 5.0, 60.0)
        self._read_breaker = Breaker(3, 5.0, 60.0)
        self._stored: list[BlockKey] = []
        self._removed: list[BlockKey] = []
        self._readers = ThreadPoolExecutor(2, "disk-read")
        self._writer = ThreadPoolExecutor(1, "disk-write")
        self._upkeep = ThreadPoolExecutor(1, "disk-upkeep")  # seals and erases, in their order
        self._lock_fd = claim(folder)
        try:
            self._scan()
        except OSError as error:
            self.close()
            raise Unavailable(f"the disk tier cannot read {folder}: {error.strerror}") from error

    # --- looking -----------------------------------------------------------------------------------------------------

    def __contains__(self, key: BlockKey) -> bool:
        breaker = self._read_breaker
        closed = breaker.state is BreakerState.CLOSED  # asking the clock 2,000 times a look-up would show
        return key in self._index and (closed or not breaker.is_open(time.monotonic()))

    def __len__(self) -> int:
        return len(self._index)

    def keys(self) -> list[BlockKey]:
        return list(self._index)

    def parent(self, key: BlockKey) -> BlockKey | None:
        return self._index.parent(key)

    def tenant(self, key: BlockKey) -> str:
        return self._index.tenant(key).decode(errors="replace")

    def touch(self, keys: Iterable[BlockKey]) -> None:
        """These are in demand."""
        self._index.touch(keys)

    @property
    def accepts_writes(self) -> bool:
        return not self._write_breaker.is_open(time.monotonic())

    @property
    def breaker(self) -> BreakerState:
        """The worse of reading and writing."""
        states = (self._read_breaker.state, self._write_breaker.state)
        return next((state for state in states if state is not BreakerState.CLOSED), BreakerState.CLOSED)

    @property
    def file_bytes(self) -> int:
        """What all files take, at most; never more than the budget."""
        return len(self._segments) * self._segment_bytes + sum(size for _, size in self._foreign)

    def drain_stored(self) -> list[BlockKey]:
        stored, self._stored = self._stored, []
        return [key for key in stored if key in self._index]

    def drain_removed(self) -> list[BlockKey]:
        removed, self._removed = self._removed, []
        return removed

    # --- reading and writing -----------------------------------------------------------------------------------------

    async def read(self, keys: Sequence[BlockKey], into: Sequence[Buffer]) -> list[int | None]:
        """Read blocks into `into[n]`; of each its checksum, which was verified, or None, and then it is dropped."""
        if not self._read_breaker.allows(time.monotonic()):
            return [None] * len(keys)
        loop = asyncio.get_running_loop()
        wanted = [(self._locate(key), key, buffer) for key, buffer in zip(keys, into, strict=True)]
        turns = [
            loop.run_in_executor(self._readers, read_blocks, self._calls, wanted[start : start + _READ_BLOCKS])
            for start in range(0, len(wanted), _READ_BLOCKS)
        ]
        found: list[int | None] = []
        failed = False
        # All turns are awaited, whatever fails: the buffers are the caller's again only then.
        for result in await asyncio.gather(*turns, return_exceptions=True):
            if isinstance(result, OSError):
                log.warning("reading from the disk tier failed: %s", result)
                failed = True
                found += [None] * (min(_READ_BLOCKS, len(keys) - len(found)))
            elif isinstance(result, BaseException):
                raise result
            else:
                found += result
        if failed:
            self._read_breaker.failed(time.monotonic())
        else:
            self._read_breaker.succeeded()
            self._drop([key for key, checksum in zip(keys, found, strict=True) if checksum is None])
        return found

    async def write(self, writes: Sequence[DiskWrite]) -> int:
        """Append blocks, parents first; how many are there now. Others are refused: a quota, a full or broken disk.

        A parent is on disk, among `writes`, or None: what could not be reached from its chain's beginning is no use.
        """
        written = 0
        writes = [write for write in writes if write.key not in self._index and self._within_quota(write.tenant)]
        while writes and self._write_breaker.allows(time.monotonic()):
            try:
                segment = await self._segment_with_room()
                batch = writes[: min(self._records - segment.num_records, _MAX_VECTORS // 2)]
                first = segment.num_records
                segment.num_records += len(batch)
                headers = [
                    encode_header(segment.info, write.key, write.parent, write.checksum, tenant_field(write.tenant))
                    for write in batch
                ]
                segment.headers += b"".join(headers)
                loop = asyncio.get_running_loop()
                await loop.run_in_executor(self._writer, write_blocks, self._calls, segment, first, headers, batch)
            except OSError as error:
                log.warning("writing to the disk tier failed, it rests for a while: %s", error)
                self._write_breaker.failed(time.monotonic())
                self._give_up_current()
                break
            self._write_breaker.succeeded()
            for record, write in enumerate(batch, first):
                if write.parent is not None and write.parent not in self._index:
                    continue  # its segment made room for this very one
                written += 1
                self._index.put(segment.seat, record, write.key, write.parent, tenant_field(write.tenant))
                self._stored.append(write.key)
            writes = writes[len(batch) :]
        return written

    def drop(self, keys: Sequence[BlockKey]) -> int:
        """These and what follows them are no longer found, in later lives neither; how many."""
        return len(self._drop(keys))

    async def verify(self) -> tuple[int, int]:
        """Read every block; how many, and how many were dropped because their bytes are wrong."""
        keys, before = self.keys(), len(self)
        buffers = [np.empty(self.block_bytes, np.uint8) for _ in range(_READ_BLOCKS)]
        for start in range(0, len(keys), _READ_BLOCKS):
            part = keys[start : start + _READ_BLOCKS]
            await self.read(part, buffers[: len(part)])
        return before, before - len(self)

    def close(self) -> None:
        """Seal what was written; waits for the threads. Idempotent."""
        self._readers.shutdown()
        self._writer.shutdown()
        self._upkeep.shutdown()
        if self._current is not None:
            self._current.seal()
            self._current = None
        self._segments.clear()
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1

    # --- segments ----------------------------------------------------------------------------------------------------

    def _locate(self, key: BlockKey) -> tuple[SegmentFile, int] | None:
        place = self._index.find(key)
        return None if place is None else (self._segments[place[0]], place[1])

    def _within_quota(self, tenant: str) -> bool:
        return (
            not tenant
            or not self._tenant_blocks
            or (self._index.tenant_blocks(tenant_field(tenant)) < self._tenant_blocks)
        )

    def _drop(self, keys: Sequence[BlockKey]) -> list[BlockKey]:
        """Their headers are overwritten in the background, and the side index that lists them is removed."""
        places = [place for key in keys if (place := self._locate(key)) is not None]
        gone = self._index.drop(keys)
        self._removed += gone
        for segment, record in places:
            if segment.headers:
                segment.headers[record * HEADER_BYTES : (record + 1) * HEADER_BYTES] = bytes(HEADER_BYTES)
            self._upkeep.submit(segment.erase, record)
        return gone

    async def _segment_with_room(self) -> SegmentFile:
        """Raises OSError."""
        current = self._current
        if current is not None and current.num_records < self._records:
            return current
        loop = asyncio.get_running_loop()
        if current is not None:
            self._upkeep.submit(current.seal)  # the disk takes what was written while we write on
        seat = self._make_room()
        self._last_id += 1
        info = SegmentInfo(self._last_id, self._generation, self.block_bytes, self._fingerprint)
        self._current = await loop.run_in_executor(self._writer, SegmentFile.create, self._folder, info, seat)
        self._segments[seat] = self._current
        self._index.seat(seat)
        return self._current

    def _make_room(self) -> int:
        """A free seat, and bytes within the budget for one more segment."""
        while self._foreign and self.file_bytes + self._segment_bytes > self.capacity_bytes:
            path, _ = self._foreign.pop(0)
            remove_segment(path)
        free = set(range(self._num_seats)) - self._segments.keys()
        while not free or (self._segments and self.file_bytes + self._segment_bytes > self.capacity_bytes):
            seat = self._index.coldest(self._segments)
            assert seat is not None
            self._remove(seat)
            free.add(seat)
        return min(free)

    def _remove(self, seat: int) -> None:
        gone = self._index.clear_seat(seat)
        self.evictions += len(gone)
        self._removed += gone
        segment = self._segments.pop(seat)
        segment.removed = True
        remove_segment(segment.path)

    def _give_up_current(self) -> None:
        """What was half written is in nobody's index. A segment that has nothing else goes: the next try needs its
        seat, or each try on a full disk would cost a segment with blocks in it."""
        current, self._current = self._current, None
        if current is not None and self._index.is_empty(current.seat):
            self._remove(current.seat)

    def _scan(self) -> None:
        """Take in what earlier lives have left. Raises OSError."""
        for path in segment_paths(self._folder):
            self._last_id = max(self._last_id, segment_id_of(path))
            try:
                segment = SegmentFile.open(path, len(self._segments), self._records)
            except BadSegment as error:
                self._leave(path, str(error))
                continue
            except OSError as error:
                log.warning("left %s alone: %s", path.name, error.strerror)
                continue
            if (segment.info.fingerprint, segment.info.block_bytes) != (self._fingerprint, self.block_bytes):
                self._leave(path, "it belongs to another model or block layout")
            elif segment.seat >= self._num_seats or path.stat().st_size > self._segment_bytes:
                self._leave(path, "the tier has become smaller")
            else:
                self._segments[segment.seat] = segment
                self._index.seat(segment.seat)
                headers, records = segment.read_headers()
                self._index.put_all(segment.seat, records, headers)
        self._index.link()

    def _leave(self, path: Path, reason: str) -> None:
        """Not ours to use, and the first to go for room. Raises OSError."""
        log.info("%s is not used: %s", path.name, reason)
        self._foreign.append((path, path.stat().st_size))
