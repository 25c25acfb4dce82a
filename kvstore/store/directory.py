"""Which block is in which slot of the arena, for every worker to read without asking: a table that the node writes.

    bucket of a key: 8 entries of 5 words      key 2 words | checksum | slot | seal

An entry may change while it is read: then its seal, a mix of the other words, does not fit, and it is as if it were not
there. A slot may get other bytes between the look and the copy: then the copy has not the checksum. So there is no lock
and no order of stores to rely on, and whoever reads here is never told of bytes that were not committed. It is a hint
that may lack blocks (a bucket is full, a block is being moved): who misses here asks the node.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from kvstore.keys import BlockKey

Words = NDArray[np.uint64]

_WAYS = 8
_FIELDS = struct.Struct("=5Q")
_BUCKET_BYTES = _WAYS * _FIELDS.size
_FIRST_WORD = struct.Struct("=Q")
_KEY_WORDS = struct.Struct("=2Q")
_SLOTS_PER_BUCKET = 2  # at most: of full buckets with 8 ways there are then 2 in 10,000
_FACTORS = (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0xD6E8FEB86659FD93)
_FOLD = 29
_WORD = (1 << 64) - 1
_FEW = 8  # keys that are looked up one by one: arrays pay from there on


def directory_bytes(num_slots: int) -> int:
    """Of the table for so many slots."""
    return _num_buckets(num_slots) * _BUCKET_BYTES


def _num_buckets(num_slots: int) -> int:
    return 1 << max(0, -(-num_slots // _SLOTS_PER_BUCKET) - 1).bit_length()


def _seal(*words: int) -> int:
    """Of the first four words of an entry. Each goes in another way, so that words of two entries make no third; one
    is added as an empty entry is not sealed."""
    seal = 1
    for word, factor in zip(words, _FACTORS, strict=True):
        mixed = word * factor & _WORD
        seal += mixed ^ mixed >> _FOLD
    return seal & _WORD


def _seals(entries: Words) -> Words:
    """The same of many, `[n, 5]`; `[n]`."""
    seals = np.ones(len(entries), np.uint64)
    for column, factor in enumerate(_FACTORS):
        mixed = entries[:, column] * np.uint64(factor)
        seals += mixed ^ (mixed >> np.uint64(_FOLD))
    return seals


class Directory:
    """A worker's view. Any thread may look."""

    def __init__(self, memory: memoryview, num_slots: int) -> None:
        """`memory`: `directory_bytes(num_slots)` of them."""
        self._memory = memory
        self._table: Words = np.frombuffer(memory, np.uint64).reshape(-1, _WAYS, _FIELDS.size // 8)
        self._mask = len(self._table) - 1
        self._num_slots = num_slots

    def find(self, keys: Sequence[BlockKey]) -> tuple[list[int], list[int]]:
        """Slots and checksums of the longest leading run of `keys` that is listed."""
        return self._find_few(keys) if len(keys) <= _FEW else self._find_many(keys)

    def _find_few(self, keys: Sequence[BlockKey]) -> tuple[list[int], list[int]]:
        slots: list[int] = []
        checksums: list[int] = []
        for key in keys:
            start = (_FIRST_WORD.unpack_from(key)[0] & self._mask) * _BUCKET_BYTES
            bucket = bytes(self._memory[start : start + _BUCKET_BYTES])  # a copy: what is judged is what is used
            at = bucket.find(key)
            if at < 0 or at % _FIELDS.size:
                break
            *words, seal = _FIELDS.unpack_from(bucket, at)
            if seal != _seal(*words) or words[3] >= self._num_slots:
                break
            slots.append(words[3])
            checksums.append(words[2])
        return slots, checksums

    def _find_many(self, keys: Sequence[BlockKey]) -> tuple[list[int], list[int]]:
        wanted: Words = np.frombuffer(b"".join(keys), np.uint64).reshape(-1, 2)
        buckets = self._table[wanted[:, 0] & np.uint64(self._mask)]
        ways = ((buckets[:, :, 0] == wanted[:, :1]) & (buckets[:, :, 1] == wanted[:, 1:])).argmax(axis=1)
        entries = buckets[np.arange(len(buckets)), ways]
        good = (entries[:, 0] == wanted[:, 0]) & (entries[:, 1] == wanted[:, 1]) & (entries[:, 4] == _seals(entries))
        good &= entries[:, 3] < np.uint64(self._num_slots)
        run = entries[: len(good) if good.all() else int(good.argmin())]
        return run[:, 3].tolist(), run[:, 2].tolist()


class DirectoryWriter:
    """The node's end. It never reads what it wrote: where an entry stands it remembers itself."""

    def __init__(self, memory: memoryview, num_slots: int) -> None:
        """`memory`: `directory_bytes(num_slots)` of them, zeros."""
        self._memory = memory
        self._mask = _num_buckets(num_slots) - 1
        self._used = bytearray(self._mask + 1)  # a bit a way
        self._places: dict[BlockKey, tuple[int, int]] = {}  # bucket and way

    def put(self, key: BlockKey, slot: int, checksum: int) -> None:
        """List a committed block; one whose bucket is full is left out."""
        place = self._places.get(key) or self._free_place(_FIRST_WORD.unpack_from(key)[0] & self._mask)
        if place is not None:
            self._places[key] = place
            words = *_KEY_WORDS.unpack(key), checksum, slot
            _FIELDS.pack_into(self._memory, self._offset(place), *words, _seal(*words))

    def remove(self, keys: Iterable[BlockKey]) -> None:
        """These are no longer where they were. Idempotent."""
        for key in keys:
            place = self._places.pop(key, None)
            if place is not None:
                self._memory[self._offset(place) : self._offset(place) + _FIELDS.size] = bytes(_FIELDS.size)
                self._used[place[0]] &= ~(1 << place[1])

    @staticmethod
    def _offset(place: tuple[int, int]) -> int:
        return place[0] * _BUCKET_BYTES + place[1] * _FIELDS.size

    def _free_place(self, bucket: int) -> tuple[int, int] | None:
        for way in range(_WAYS):
            if not self._used[bucket] >> way & 1:
                self._used[bucket] |= 1 << way
                return bucket, way
        return None
