"""Segment files of the disk tier: a page that says what the file is, then records of one size, appended only.

    page 0: magic "PDSG" | version u16 | zero u16 | segment_id u64 | generation u64 | block_bytes u64 |
            fingerprint 16 | xxh3-64 of everything before, u64 | zeros up to 4,096 bytes
    record: header of 128 bytes, then the block
    header: magic "PDBK" | version u16 | zero u16 | key 16 | parent 16 (zeros: none) | fingerprint 16 | generation u64 |
            length u64 | xxh3-64 of the block u64 | tenant 32 | xxh3-64 of everything before, u64 | zeros

All little-endian. The generation is the life of the node that wrote the file; no life appends to the file of another.
Since all records of a file have one size, a torn or damaged one hides no other. A sealed segment has a side index, its
headers one behind the other under one checksum; without it the headers are read from the segment itself.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from kvstore.errors import KvError
from kvstore.keys import BlockKey
from kvstore.store.wire import NO_PARENT

PAGE_BYTES = 4096
HEADER_BYTES = 128
TENANT_BYTES = 32
FINGERPRINT_BYTES = 16
_VERSION = 1
_SEGMENT_MAGIC, _RECORD_MAGIC, _INDEX_MAGIC = b"PDSG", b"PDBK", b"PDIX"
_SEGMENT = struct.Struct("<4sHHQQQ16s")
_RECORD = struct.Struct("<4sHH16s16s16sQQQ32s")
_INDEX = struct.Struct("<4sHHQQ")  # magic, version, zero, segment_id, num_records; then checksum of it and the body
_CHECKSUM = struct.Struct("<Q")

HEADER = np.dtype(
    {
        "names": ["magic", "version", "key", "parent", "fingerprint", "generation", "length", "checksum", "tenant"],
        "formats": ["V4", "<u2", "V16", "V16", "V16", "<u8", "<u8", "<u8", "S32"],
        "offsets": [0, 4, 8, 24, 40, 56, 64, 72, 80],
        "itemsize": HEADER_BYTES,
    }
)
Headers = NDArray[np.void]  # of dtype HEADER


class BadSegment(KvError):
    """A file of the disk tier that is not what it should be; it is left alone, or removed for room."""


@dataclass(frozen=True, slots=True)
class SegmentInfo:
    """What page 0 says."""

    segment_id: int
    generation: int
    block_bytes: int
    fingerprint: bytes

    @property
    def stride(self) -> int:
        return HEADER_BYTES + self.block_bytes

    def offset(self, record: int) -> int:
        return PAGE_BYTES + record * self.stride

    def encode(self) -> bytes:
        body = _SEGMENT.pack(
            _SEGMENT_MAGIC, _VERSION, 0, self.segment_id, self.generation, self.block_bytes, self.fingerprint
        )
        return (body + _CHECKSUM.pack(xxhash.xxh3_64_intdigest(body))).ljust(PAGE_BYTES, b"\0")

    @classmethod
    def decode(cls, page: bytes) -> SegmentInfo:
        """Raises BadSegment."""
        if len(page) != PAGE_BYTES:
            raise BadSegment("a segment is shorter than its first page")
        body, end = page[: _SEGMENT.size], _SEGMENT.size
        magic, version, zero, segment_id, generation, block_bytes, fingerprint = _SEGMENT.unpack(body)
        if (magic, version, zero) != (_SEGMENT_MAGIC, _VERSION, 0):
            raise BadSegment(f"not a segment of version {_VERSION}")
        if _CHECKSUM.unpack_from(page, end)[0] != xxhash.xxh3_64_intdigest(body) or block_bytes <= 0:
            raise BadSegment("the first page of a segment is damaged")
        return cls(segment_id, generation, block_bytes, fingerprint)


def encode_header(info: SegmentInfo, key: BlockKey, parent: BlockKey | None, checksum: int, tenant: bytes) -> bytes:
    """The 128 bytes before a block."""
    body = _RECORD.pack(
        _RECORD_MAGIC,
        _VERSION,
        0,
        key,
        parent or NO_PARENT,
        info.fingerprint,
        info.generation,
        info.block_bytes,
        checksum,
        tenant,
    )
    return (body + _CHECKSUM.pack(xxhash.xxh3_64_intdigest(body))).ljust(HEADER_BYTES, b"\0")


def is_header_of(header: bytes, info: SegmentInfo, key: BlockKey) -> int | None:
    """The checksum that the block behind this header must have; None if the header is damaged or another's."""
    body = header[: _RECORD.size]
    if _CHECKSUM.unpack_from(header, _RECORD.size)[0] != xxhash.xxh3_64_intdigest(body):
        return None
    magic, version, zero, found, _, fingerprint, generation, length, checksum, _ = _RECORD.unpack(body)
    expected = (_RECORD_MAGIC, _VERSION, 0, key, info.fingerprint, info.generation, info.block_bytes)
    return checksum if (magic, version, zero, found, fingerprint, generation, length) == expected else None


def tenant_field(tenant: str) -> bytes:
    """A tenant's id in 32 bytes; of a longer one its hash."""
    encoded = tenant.encode()
    return encoded if len(encoded) <= TENANT_BYTES else blake2b(encoded, digest_size=16).hexdigest().encode()


def read_headers(fd: int, info: SegmentInfo) -> tuple[Headers, NDArray[np.int64]]:
    """Headers of the whole records of a segment, and their positions; damaged ones are left out."""
    num_records = _num_whole(fd, info)
    data = bytearray(num_records * HEADER_BYTES)
    view = memoryview(data)
    good: list[int] = []
    digest, unpack, body_bytes = xxhash.xxh3_64_intdigest, _CHECKSUM.unpack_from, _RECORD.size
    for record in range(num_records):
        start = record * HEADER_BYTES
        header = view[start : start + HEADER_BYTES]
        if os.preadv(fd, [header], PAGE_BYTES + record * info.stride) != HEADER_BYTES:
            continue
        if unpack(header, body_bytes)[0] == digest(header[:body_bytes]):
            good.append(record)
    records = np.array(good, np.int64)
    return _matching(np.frombuffer(data, HEADER)[records], records, info)


def encode_index(info: SegmentInfo, headers: bytes) -> bytes:
    """The side index of a sealed segment, from its headers in their order."""
    head = _INDEX.pack(_INDEX_MAGIC, _VERSION, 0, info.segment_id, len(headers) // HEADER_BYTES)
    digest = xxhash.xxh3_64()
    digest.update(head)
    digest.update(headers)
    return head + _CHECKSUM.pack(digest.intdigest()) + headers


def read_index(path: Path, fd: int, info: SegmentInfo) -> tuple[Headers, NDArray[np.int64]]:
    """Like `read_headers`, from the side index. Raises BadSegment or OSError; the segment itself is asked then."""
    num_whole = _num_whole(fd, info)
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb") as file:
        data = file.read()
    start = _INDEX.size + _CHECKSUM.size
    if len(data) < start:
        raise BadSegment("a side index is too short")
    magic, version, zero, segment_id, count = _INDEX.unpack_from(data)
    digest = xxhash.xxh3_64()
    digest.update(data[: _INDEX.size])
    digest.update(memoryview(data)[start:])
    if _CHECKSUM.unpack_from(data, _INDEX.size)[0] != digest.intdigest():
        raise BadSegment("a side index is damaged")
    if (magic, version, zero, segment_id) != (_INDEX_MAGIC, _VERSION, 0, info.segment_id):
        raise BadSegment("a side index is of another segment")
    if len(data) - start != count * HEADER_BYTES:
        raise BadSegment("a side index has another length than it says")
    headers = np.frombuffer(data, HEADER, offset=start)[:num_whole]
    return _matching(headers, np.arange(len(headers)), info)


def _num_whole(fd: int, info: SegmentInfo) -> int:
    """Records that the file has room for; a torn last one does not count."""
    return max(0, os.fstat(fd).st_size - PAGE_BYTES) // info.stride


def _matching(headers: Headers, records: NDArray[np.int64], info: SegmentInfo) -> tuple[Headers, NDArray[np.int64]]:
    """Those that belong to this segment's model and life."""
    good = (
        (headers["magic"] == np.void(_RECORD_MAGIC))
        & (headers["version"] == _VERSION)
        & (headers["fingerprint"] == np.void(info.fingerprint))
        & (headers["generation"] == info.generation)
        & (headers["length"] == info.block_bytes)
    )
    return headers[good], records[good]
