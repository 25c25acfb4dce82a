"""Block keys: a chained 128-bit hash names the KV of a block and of everything before it.

    root  = H("root",  fingerprint, salt, adapter)
    key_i = H("block", key_{i-1}, tokens of block i)        key_{-1} = root

Every field is length-prefixed, so no two different inputs share a preimage. One function makes keys; every tier, the
index and the router use the type `BlockKey`. The fingerprint names model, dtype and layout; the salt comes from the
server's tenant configuration, so a look-up can only hit blocks of the same tenant (design invariant I6).
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Sequence
from hashlib import blake2b
from typing import NewType

BlockKey = NewType("BlockKey", bytes)
KEY_BYTES = 16

_LEN = struct.Struct("<Q")


def _field(value: bytes) -> bytes:
    return _LEN.pack(len(value)) + value


def root_key(fingerprint: bytes, salt: bytes = b"", adapter: str = "") -> BlockKey:
    """The key that all first blocks of one (model, tenant, adapter) chain from; 16 bytes."""
    preimage = _field(b"root") + _field(fingerprint) + _field(salt) + _field(adapter.encode())
    return BlockKey(blake2b(preimage, digest_size=KEY_BYTES).digest())


def content_key(root: BlockKey, token_ids: Sequence[int]) -> BlockKey:
    """Names the KV of all of `token_ids`, also those that fill no block: `H("content", root, tokens)`, 16 bytes."""
    preimage = _field(b"content") + _field(root) + _field(array("I", token_ids).tobytes())
    return BlockKey(blake2b(preimage, digest_size=KEY_BYTES).digest())


def block_keys(root: BlockKey, token_ids: Sequence[int], block_size: int) -> list[BlockKey]:
    """Keys of the full blocks of `token_ids`; a partial last block has none.

    Args:
        root: from `root_key`.
        token_ids: token ids in [0, 2**32).
        block_size: tokens a block, positive.

    Raises:
        ValueError: a token id or the block size is out of range.
    """
    if block_size <= 0:
        raise ValueError(f"block_size must be positive, got {block_size}")
    try:
        tokens = array("I", token_ids)
    except OverflowError as error:
        raise ValueError("token ids must lie in [0, 2**32)") from error
    data = memoryview(tokens).cast("B")
    stride = block_size * tokens.itemsize
    # The three prefixes are the same for every block: tag, key length, token bytes length.
    head = _field(b"block") + _LEN.pack(KEY_BYTES)
    middle = _LEN.pack(stride)
    keys: list[BlockKey] = []
    parent: bytes = root
    for start in range(0, len(tokens) // block_size * stride, stride):
        parent = blake2b(b"".join((head, parent, middle, data[start : start + stride])), digest_size=KEY_BYTES).digest()
        keys.append(BlockKey(parent))
    return keys
