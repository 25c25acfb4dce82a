"""What the frames between a worker and its store node carry: fixed fields, then columns. Pure.

    HELLO           magic "PDKV" | version u16 | owner_bytes u16 | block_bytes u64 | fingerprint 16 |
                    previous_session u64 | owner | slot u32 ... | generation u64 ...     of what it still writes
      reply         session u64 | incarnation u64 | lease_s f64 | num_slots u32 | address_bytes u16 |
                    shares u8 | address | arena path
    LOOKUP          key 16 ...                           reply: tier u8 ...             of the leading run
    LOAD            deadline_s f64 | key 16 ...
      reply         lease u64 | slot u32 ... | checksum u64 ... | tier u8 ...
    RELEASE         lease u64 ...                        no reply
    BEGIN_SAVE      num_keys u32 | key 16 ... | parent 16 ... | tenant
      reply         slot u32 ... | generation u64 ...    0xffffffff: nothing to write
    COMMIT_SAVE     slot u32 ... | generation u64 ... | checksum u64 ...                reply: empty
    ABANDON_SAVE    slot u32 ... | generation u64 ...    reply: empty
    REPORT_CORRUPT  key 16 ...                           reply: count u64               of those that were dropped
    HOLD            lease u64 | key 16 ...               no reply                       a lease that the worker numbers
    REFUSAL         a sentence

Columns of one message are equally long. A decoder raises BadFrame for whatever it cannot take.
"""

from __future__ import annotations

import math
import struct
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from kvstore.keys import KEY_BYTES, BlockKey
from kvstore.store.frames import BadFrame
from kvstore.store.wire import MAX_KEYS, join_keys, join_parents, split_keys, split_parents

VERSION = 2
NO_SLOT = 0xFFFFFFFF
MAX_OWNER_BYTES = 512
MAX_TENANT_BYTES = 1024
TOLD = 1 << 63  # in the number of a lease that the worker gave; the node's own lie below
_MAGIC = b"PDKV"
_OPENING = struct.Struct("=4sH")  # what every version of HELLO begins with
_HELLO = struct.Struct("=4sHHQ16sQ")
_WELCOME = struct.Struct("=QQdIH?")
_DEADLINE = struct.Struct("=d")
_NUMBER = struct.Struct("=Q")
_COUNT = struct.Struct("=I")
_SLOT_BYTES, _WORD_BYTES = 4, 8


@dataclass(frozen=True, slots=True)
class Hello:
    """Who attaches. `writing`: slot and generation of what it still writes of its session before this one."""

    owner: str
    block_bytes: int
    fingerprint: bytes
    previous_session: int = 0
    writing: tuple[tuple[int, int], ...] = ()

    def encode(self) -> bytes:
        owner = self.owner.encode()[:MAX_OWNER_BYTES]
        head = _HELLO.pack(_MAGIC, VERSION, len(owner), self.block_bytes, self.fingerprint, self.previous_session)
        return b"".join((head, owner, encode_refs(self.writing)))

    @classmethod
    def decode(cls, data: bytes) -> Hello:
        magic, version = _OPENING.unpack_from(data) if len(data) >= _OPENING.size else (b"", 0)
        if magic != _MAGIC:
            raise BadFrame("this is no HELLO of a pdserve worker")
        if version != VERSION:
            raise BadFrame(f"this store node speaks version {VERSION} of the workers' protocol, not {version}")
        if len(data) < _HELLO.size:
            raise BadFrame("HELLO is too short")
        _, _, owner_bytes, block_bytes, fingerprint, previous = _HELLO.unpack_from(data)
        end = _HELLO.size + owner_bytes
        if owner_bytes > MAX_OWNER_BYTES or end > len(data):
            raise BadFrame("the owner's name in HELLO is too long")
        owner = data[_HELLO.size : end].decode(errors="replace")
        return cls(owner, block_bytes, fingerprint, previous, tuple(decode_refs(data[end:])))


@dataclass(frozen=True, slots=True)
class Welcome:
    """A session with one life of the node. Without a host tier `arena_path` is empty.

    `address` is where other nodes and routers reach it; `shares`: it fetches from other nodes, and they from it.
    """

    session_id: int
    incarnation: int
    lease_s: float
    num_slots: int
    arena_path: str
    address: str = ""
    shares: bool = False

    def encode(self) -> bytes:
        address = self.address.encode()
        sizes = (self.num_slots, len(address), self.shares)
        head = _WELCOME.pack(self.session_id, self.incarnation, self.lease_s, *sizes)
        return b"".join((head, address, self.arena_path.encode()))

    @classmethod
    def decode(cls, data: bytes) -> Welcome:
        if len(data) < _WELCOME.size:
            raise BadFrame("the answer to HELLO is too short")
        session_id, incarnation, lease_s, num_slots, address_bytes, shares = _WELCOME.unpack_from(data)
        end = _WELCOME.size + address_bytes
        address, arena_path = (part.decode(errors="replace") for part in (data[_WELCOME.size : end], data[end:]))
        return cls(session_id, incarnation, lease_s, num_slots, arena_path, address, shares)


@dataclass(frozen=True, slots=True)
class LoadReply:
    """Columns of what is leased, in the order of the keys; a lease of 0 has none."""

    lease_id: int
    slots: Sequence[int]
    checksums: Sequence[int]
    tiers: bytes

    def encode(self) -> bytes:
        head = _NUMBER.pack(self.lease_id)
        return b"".join((head, array("I", self.slots), array("Q", self.checksums), self.tiers))

    @classmethod
    def decode(cls, data: bytes) -> LoadReply:
        count, rest = divmod(len(data) - _NUMBER.size, _SLOT_BYTES + _WORD_BYTES + 1)
        if count < 0 or rest:
            raise BadFrame("the answer to LOAD has columns of different lengths")
        middle = _NUMBER.size + count * _SLOT_BYTES
        end = middle + count * _WORD_BYTES
        slots, checksums = _column("I", data[_NUMBER.size : middle]), _column("Q", data[middle:end])
        return cls(_NUMBER.unpack_from(data)[0], slots, checksums, data[end:])


def encode_load(deadline_s: float, keys: Sequence[BlockKey]) -> bytes:
    return _DEADLINE.pack(deadline_s) + join_keys(keys)


def decode_load(data: bytes) -> tuple[float, list[BlockKey]]:
    if len(data) < _DEADLINE.size:
        raise BadFrame("LOAD is too short")
    (deadline_s,) = _DEADLINE.unpack_from(data)
    if not math.isfinite(deadline_s):
        raise BadFrame("a deadline is a finite number of seconds")
    return deadline_s, decode_keys(data[_DEADLINE.size :])


def decode_keys(data: bytes) -> list[BlockKey]:
    try:
        return split_keys(data)
    except ValueError as error:
        raise BadFrame(str(error)) from error


def encode_leases(lease_ids: Iterable[int]) -> bytes:
    return array("Q", lease_ids).tobytes()


def decode_leases(data: bytes) -> list[int]:
    if len(data) % _WORD_BYTES:
        raise BadFrame("RELEASE carries whole lease ids")
    return _column("Q", data)


def encode_hold(lease_id: int, keys: Sequence[BlockKey]) -> bytes:
    return _NUMBER.pack(lease_id) + join_keys(keys)


def decode_hold(data: bytes) -> tuple[int, list[BlockKey]]:
    if len(data) < _NUMBER.size:
        raise BadFrame("HOLD is too short")
    (lease_id,) = _NUMBER.unpack_from(data)
    if not lease_id & TOLD:
        raise BadFrame("HOLD names a lease of the node's own")
    return lease_id, decode_keys(data[_NUMBER.size :])


def encode_count(count: int) -> bytes:
    return _NUMBER.pack(count)


def decode_count(data: bytes) -> int:
    if len(data) != _NUMBER.size:
        raise BadFrame("a count is one number")
    return int(_NUMBER.unpack(data)[0])


def encode_begin(entries: Sequence[tuple[BlockKey, BlockKey | None]], tenant: str) -> bytes:
    """Raises ValueError for more than `MAX_KEYS` entries, or a tenant's name longer than `MAX_TENANT_BYTES`."""
    name = tenant.encode()
    if len(name) > MAX_TENANT_BYTES:
        raise ValueError(f"a tenant's name has at most {MAX_TENANT_BYTES} bytes, got {len(name)}")
    keys = join_keys([key for key, _ in entries])
    return b"".join((_COUNT.pack(len(entries)), keys, join_parents([parent for _, parent in entries]), name))


def decode_begin(data: bytes) -> tuple[list[tuple[BlockKey, BlockKey | None]], str]:
    if len(data) < _COUNT.size:
        raise BadFrame("BEGIN_SAVE is too short")
    (count,) = _COUNT.unpack_from(data)
    middle = _COUNT.size + count * KEY_BYTES
    end = middle + count * KEY_BYTES
    if count > MAX_KEYS or not end <= len(data) <= end + MAX_TENANT_BYTES:
        raise BadFrame("BEGIN_SAVE has another length than it says")
    keys, parents = split_keys(data[_COUNT.size : middle]), split_parents(data[middle:end])
    return list(zip(keys, parents, strict=True)), data[end:].decode(errors="replace")


def encode_refs(refs: Iterable[tuple[int, int] | None]) -> bytes:
    """Slot and generation each; None is `NO_SLOT`."""
    pairs = [(NO_SLOT, 0) if ref is None else ref for ref in refs]
    return array("I", [slot for slot, _ in pairs]).tobytes() + array("Q", [number for _, number in pairs]).tobytes()


def decode_refs(data: bytes) -> list[tuple[int, int]]:
    count, rest = divmod(len(data), _SLOT_BYTES + _WORD_BYTES)
    if rest:
        raise BadFrame("each slot has a generation")
    middle = count * _SLOT_BYTES
    return list(zip(_column("I", data[:middle]), _column("Q", data[middle:]), strict=True))


def encode_commit(refs: Sequence[tuple[int, int]], checksums: Sequence[int]) -> bytes:
    return encode_refs(refs) + array("Q", checksums).tobytes()


def decode_commit(data: bytes) -> list[tuple[tuple[int, int], int]]:
    count, rest = divmod(len(data), _SLOT_BYTES + 2 * _WORD_BYTES)
    if rest:
        raise BadFrame("each slot has a generation and a checksum")
    end = count * (_SLOT_BYTES + _WORD_BYTES)
    return list(zip(decode_refs(data[:end]), _column("Q", data[end:]), strict=True))


def _column(code: str, data: bytes) -> list[int]:
    values = array(code)
    values.frombytes(data)
    return values.tolist()
