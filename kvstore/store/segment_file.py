"""Files of segments: begun, written and read in runs of records, sealed. All of it blocks, so it runs in threads."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from kvstore.keys import BlockKey
from kvstore.store.disk_folder import NO_FOLLOW, index_path, remove_segment, segment_path
from kvstore.store.segment import (
    HEADER_BYTES,
    PAGE_BYTES,
    BadSegment,
    Headers,
    SegmentInfo,
    encode_index,
    is_header_of,
    read_headers,
    read_index,
)
from kvstore.transfer.checksum import block_checksum
from kvstore.transfer.transport import Buffer

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class DiskWrite:
    """A block to write; `data` does not change before the write has ended."""

    key: BlockKey
    parent: BlockKey | None
    checksum: int
    data: Buffer
    tenant: str


class DiskCalls(Protocol):
    """The system calls that move blocks; tests put faulty ones in their place."""

    def pwritev(self, fd: int, buffers: Sequence[Any], offset: int) -> int: ...

    def preadv(self, fd: int, buffers: Sequence[Any], offset: int) -> int: ...


class OsCalls:
    def pwritev(self, fd: int, buffers: Sequence[Any], offset: int) -> int:
        return os.pwritev(fd, buffers, offset)

    def preadv(self, fd: int, buffers: Sequence[Any], offset: int) -> int:
        return os.preadv(fd, buffers, offset)


@dataclass(slots=True, eq=False)
class SegmentFile:
    """A file of ours that is open. Its descriptor is closed when nobody reads it any more."""

    info: SegmentInfo
    path: Path
    seat: int
    fd: int
    num_records: int  # written or being written; of an earlier life's file: all that it could have
    headers: bytearray = field(default_factory=bytearray)  # of the file being written
    removed: bool = False

    def __del__(self) -> None:
        os.close(self.fd)

    @classmethod
    def create(cls, folder: Path, info: SegmentInfo, seat: int) -> SegmentFile:
        """Raises OSError, and leaves no file then."""
        path = segment_path(folder, info.segment_id)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | NO_FOLLOW, 0o600)
        segment = cls(info, path, seat, fd, 0)
        try:
            if os.pwrite(fd, info.encode(), 0) != PAGE_BYTES:
                raise OSError("a new segment could not be begun")
        except OSError:
            remove_segment(path)
            raise
        return segment

    @classmethod
    def open(cls, path: Path, seat: int, num_records: int) -> SegmentFile:
        """One of an earlier life, of at most so many records. Raises OSError, or BadSegment if it is none."""
        fd = os.open(path, os.O_RDWR | NO_FOLLOW)
        try:
            info = SegmentInfo.decode(os.pread(fd, PAGE_BYTES, 0))
        except BaseException:
            os.close(fd)
            raise
        return cls(info, path, seat, fd, num_records)

    def read_headers(self) -> tuple[Headers, NDArray[np.int64]]:
        """Headers of its records and their positions: from the side index if that is good. Raises OSError."""
        try:
            return read_index(index_path(self.path), self.fd, self.info)
        except (OSError, BadSegment):
            return read_headers(self.fd, self.info)

    def seal(self) -> None:
        """Nothing more is appended: make it last, and write the side index. Without that the segment itself is read."""
        path = index_path(self.path)
        try:
            os.fdatasync(self.fd)
            path.unlink(missing_ok=True)
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | NO_FOLLOW, 0o600)
            with os.fdopen(fd, "wb") as file:
                file.write(encode_index(self.info, bytes(self.headers)))
            self.headers.clear()
            if self.removed:  # meanwhile, for room: its index must not stay behind
                path.unlink(missing_ok=True)
        except OSError as error:
            log.warning("a segment of the disk tier could not be sealed: %s", error)

    def erase(self, record: int) -> None:
        """Not to be found in later lives either: overwrite its header, and remove the side index that lists it."""
        with contextlib.suppress(OSError):
            os.pwrite(self.fd, bytes(HEADER_BYTES), self.info.offset(record))
            index_path(self.path).unlink()


def read_blocks(
    calls: DiskCalls, wanted: Sequence[tuple[tuple[SegmentFile, int] | None, BlockKey, Buffer]]
) -> list[int | None]:
    """Blocks by segment and record, each into its buffer; of each its checksum, which was verified, or None.

    Neighbours are read in one call. Raises OSError.
    """
    found: list[int | None] = []
    start = 0
    while start < len(wanted):
        place = wanted[start][0]
        if place is None:
            found.append(None)
            start += 1
            continue
        segment, record = place
        end = start + 1
        while end < len(wanted) and (after := wanted[end][0]) is not None:
            if after != (segment, record + end - start):
                break
            end += 1
        headers = [bytearray(HEADER_BYTES) for _ in range(start, end)]
        buffers = [part for header, one in zip(headers, wanted[start:end], strict=True) for part in (header, one[2])]
        num_bytes = calls.preadv(segment.fd, buffers, segment.info.offset(record))
        for ordinal, header in enumerate(headers):
            _, key, buffer = wanted[start + ordinal]
            whole = num_bytes >= (ordinal + 1) * segment.info.stride
            checksum = is_header_of(bytes(header), segment.info, key) if whole else None
            found.append(checksum if checksum is not None and block_checksum(buffer) == checksum else None)
        start = end
    return found


def write_blocks(
    calls: DiskCalls, segment: SegmentFile, first: int, headers: Sequence[bytes], writes: Sequence[DiskWrite]
) -> None:
    """Blocks behind their headers, from record `first` on. Raises OSError."""
    parts = [part for header, write in zip(headers, writes, strict=True) for part in (header, write.data)]
    left = len(writes) * segment.info.stride
    written = calls.pwritev(segment.fd, parts, segment.info.offset(first))
    if written < left:  # a signal, or the disk is nearly full: the rest piece by piece, or the error it would give
        offset = segment.info.offset(first) + written
        rest = memoryview(b"".join(bytes(part) for part in parts))[written:]
        while rest:
            step = calls.pwritev(segment.fd, [bytes(rest)], offset)
            if step <= 0:
                raise OSError("nothing more can be written")
            rest, offset = rest[step:], offset + step
