"""Block keys: a chained 128-bit hash names the KV of a block and of everything before it.

    root  = H("root",   fingerprint, salt, adapter)
    key_i = H("blocks", key_{g-1}, stride, tokens of blocks g .. i)     g = i - i % 16,  key_{-1} = root

The chain has a link each `GROUP_BLOCKS` blocks; inside a group a key hashes the group's tokens so far. That names the
same prefix as a link at each block would, and lets a reader that skips from group to group (`KeyChain`, the router)
make a sixteenth of the calls: here it is calls, not bytes, that hashing costs.

Every field but the last is length-prefixed, so no two different inputs share a preimage. One function makes keys;
every tier, the index and the router use the type `BlockKey`. The fingerprint names model, dtype and layout; the salt
comes from the server's tenant configuration, so a look-up can only hit blocks of the same tenant (design invariant I6).
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from functools import lru_cache
from hashlib import blake2b
from typing import NewType, overload

BlockKey = NewType("BlockKey", bytes)
KEY_BYTES = 16
GROUP_BLOCKS = 16

_LEN = struct.Struct("<Q")
_TOKEN_BYTES = 4


def _field(value: bytes) -> bytes:
    return _LEN.pack(len(value)) + value


_HEAD = _field(b"blocks") + _LEN.pack(
    KEY_BYTES
)  # the key before the group follows, then the length of a block's tokens
_BEFORE_TOKENS = len(_HEAD) + KEY_BYTES + _LEN.size


def root_key(fingerprint: bytes, salt: bytes = b"", adapter: str = "") -> BlockKey:
    """The key that all first blocks of one (model, tenant, adapter) chain from; 16 bytes."""
    preimage = _field(b"root") + _field(fingerprint) + _field(salt) + _field(adapter.encode())
    return _digest(preimage)


def content_key(root: BlockKey, token_ids: Sequence[int]) -> BlockKey:
    """Names the KV of all of `token_ids`, also those that fill no block: `H("content", root, tokens)`, 16 bytes."""
    preimage = _field(b"content") + _field(root) + _field(_packed(token_ids))
    return _digest(preimage)


def block_keys(root: BlockKey, token_ids: Sequence[int], block_size: int) -> list[BlockKey]:
    """Keys of the full blocks of `token_ids`; a partial last block has none.

    Args:
        root: from `root_key`, or the key before a group: that of block `GROUP_BLOCKS` * n - 1 of the same chain.
        token_ids: token ids in [0, 2**32).
        block_size: tokens a block, positive.

    Raises:
        ValueError: a token id or the block size is out of range.
    """
    data = _packed(token_ids[: len(token_ids) // _checked(block_size) * block_size])
    stride = block_size * _TOKEN_BYTES
    middle = _LEN.pack(stride)
    keys: list[BlockKey] = []
    parent = root
    for begin in range(0, len(data), GROUP_BLOCKS * stride):
        group = blake2b(b"".join((_HEAD, parent, middle)), digest_size=KEY_BYTES)
        for start in range(begin, min(begin + GROUP_BLOCKS * stride, len(data)), stride):
            group.update(data[start : start + stride])
            parent = BlockKey(group.digest())
            keys.append(parent)
    return keys


class KeyChain(Sequence[BlockKey]):
    """`block_keys(root, token_ids, block_size)`, each key derived when it is asked for.

    Any key costs one hash of its group so far, if the last keys of the groups before it were asked for. Tokens are
    checked a group at a time, as they are reached. Keeps four bytes a token that was.
    """

    __slots__ = ("_ends", "_groups", "_inner", "_length", "_middle", "_size", "_tokens")

    def __init__(self, root: BlockKey, token_ids: Sequence[int], block_size: int) -> None:
        self._size = _checked(block_size)
        self._tokens = token_ids
        self._length = len(token_ids) // block_size
        self._middle = _LEN.pack(block_size * _TOKEN_BYTES)
        self._ends = [root]  # the key before each group that was reached
        self._groups: dict[int, bytes] = {}  # what is hashed for their last keys, of groups that were reached
        self._inner: dict[int, BlockKey] = {}  # other keys, by block

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, at: int) -> BlockKey: ...

    @overload
    def __getitem__(self, at: slice) -> list[BlockKey]: ...

    def __getitem__(self, at: int | slice) -> BlockKey | list[BlockKey]:
        if isinstance(at, slice):
            return [self[each] for each in range(*at.indices(self._length))]
        if at < 0:
            at += self._length
        if not 0 <= at < self._length:
            raise IndexError(at)
        group, rest = divmod(at + 1, GROUP_BLOCKS)
        ends = self._ends
        while len(ends) <= group:
            ends.append(_digest(self._group(len(ends) - 1)))
        if not rest:
            return ends[group]
        key = self._inner.get(at)
        if key is None:
            key = self._inner[at] = _digest(self._group(group)[: _BEFORE_TOKENS + rest * self._size * _TOKEN_BYTES])
        return key

    def _group(self, group: int) -> bytes:
        """What is hashed for the last key of a group whose predecessor is known; a part of it for the others."""
        found = self._groups.get(group)
        if found is None:
            tokens = GROUP_BLOCKS * self._size
            data = _packed(self._tokens[group * tokens : (group + 1) * tokens])
            found = self._groups[group] = b"".join((_HEAD, self._ends[group], self._middle, data))
        return found


def landmarks(keys: Sequence[BlockKey]) -> list[BlockKey]:
    """The first key, the last of each group, the last of all: what a look-up visits first. Cheap of a `KeyChain`."""
    length = len(keys)
    ends = (*range(GROUP_BLOCKS, length, GROUP_BLOCKS), length)
    return [keys[0], *(keys[end - 1] for end in ends if end > 1)] if length else []


def _digest(preimage: bytes) -> BlockKey:
    return BlockKey(blake2b(preimage, digest_size=KEY_BYTES).digest())


def _checked(block_size: int) -> int:
    if block_size <= 0:
        raise ValueError(f"block_size must be positive, got {block_size}")
    return block_size


def _packed(token_ids: Sequence[int]) -> bytes:
    """Four bytes each, the lowest first."""
    try:
        return _packer(len(token_ids))(*token_ids)
    except struct.error as error:
        raise ValueError("token ids must lie in [0, 2**32)") from error


@lru_cache(maxsize=64)
def _packer(count: int) -> Callable[..., bytes]:
    return struct.Struct(f"<{count}I").pack
