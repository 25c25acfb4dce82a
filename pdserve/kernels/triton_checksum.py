"""xxh3-64 of many blocks at once, where they lie: the checksum that `kvstore.transfer.checksum` takes on the host.

One program a block. The algorithm adds up the sixteen stripes of a KiB in any order and then scrambles the sums, so a
program goes through its block KiB by KiB, and the blocks go side by side. The algorithm is XXH3 for long input with its
default secret: https://github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

_SECRET = bytes.fromhex(
    "b8fe6c3923a44bbe7c01812cf721ad1cded46de9839097db7240a4a4b7b3671fcb79e64eccc0e578825ad07dccff7221"
    "b8084674f743248ee03590e6813a264c3c2852bb91c300cb88d0658b1b532ea371644897a20df94e3819ef46a9deacd8"
    "a8fa763fe39c343ff9dcbbc7c70b4f1d8a51e04bcdb45931c89f7ec9d9787364eac5ac8334d3ebc3c581a0fffa1363eb"
    "170ddd51b7f0da49d316552629d4689e2b16be587d47a1fc8ff8b8d17ad031ce45cb3a8f95160428afd7fbcabb4b407e"
)
_PRIME32 = (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D)
_PRIME64 = (0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0x85EBCA77C2B2AE63, 0x27D4EB2F165667C5)
_AVALANCHE = 0x165667919E3779F9
_SHORTEST_BYTES = 241  # what is shorter is hashed another way
_STRIPE_BYTES = 64
_ROUND_BYTES = 1024

# Places in the kernel's table of words.
_KEYS = tl.constexpr(0)  # the secret; stripe s of a round begins at word s
_SCRAMBLE = tl.constexpr(16)  # its last 64 bytes
_LAST = tl.constexpr(24)  # the secret at the odd offset that the last stripe has
_MERGE = tl.constexpr(32)  # and at that of the end
_SUMS = tl.constexpr(40)  # as they begin
_NUMBERS = tl.constexpr(48)  # the multipliers of scrambling, length and avalanche


@triton.jit
def _words(at, inside=None):
    return tl.load(at, mask=inside, other=0 if inside is not None else None).to(tl.uint64, bitcast=True)


@triton.jit
def _products(words, keys):
    """Of each word's halves under its key."""
    mixed = words ^ keys
    return mixed.to(tl.uint32).to(tl.uint64) * (mixed >> 32)


@triton.jit
def _hash(blocks_ptr, ids_ptr, table_ptr, out_ptr, block_words, num_rounds, num_stripes):
    """A block is `num_rounds` rounds, `num_stripes` stripes behind them, and its last 64 bytes, which may overlap."""
    block = blocks_ptr + tl.load(ids_ptr + tl.program_id(0)) * block_words
    lane = tl.arange(0, 8)
    stripe = tl.arange(0, 16)[:, None]
    at, other = stripe * 8 + lane[None, :], stripe * 8 + (lane ^ 1)[None, :]  # a word counts for its neighbour too
    keys = _words(table_ptr + _KEYS + stripe + lane[None, :])
    scramble = _words(table_ptr + _SCRAMBLE + lane)
    multiplier = _words(table_ptr + _NUMBERS)
    sums = _words(table_ptr + _SUMS + lane)
    for _ in range(num_rounds):
        sums += tl.sum(_products(_words(block + at), keys) + _words(block + other), 0)
        sums = (sums ^ (sums >> 47) ^ scramble) * multiplier
        block += 128
    inside = at < num_stripes * 8
    products = _products(_words(block + at, inside), keys)
    sums += tl.sum(tl.where(inside, products, 0) + _words(block + other, inside), 0)
    end = block - num_rounds * 128 + block_words - 8
    sums += _products(_words(end + lane), _words(table_ptr + _LAST + lane)) + _words(end + (lane ^ 1))
    even, odd = tl.split(tl.reshape(sums ^ _words(table_ptr + _MERGE + lane), (4, 2)))
    value = tl.sum((even * odd) ^ tl.umulhi(even, odd), 0)
    value += (block_words * 8).to(tl.uint64) * _words(table_ptr + _NUMBERS + 1)
    value = (value ^ (value >> 37)) * _words(table_ptr + _NUMBERS + 2)
    tl.store(out_ptr + tl.program_id(0), (value ^ (value >> 32)).to(tl.int64, bitcast=True))


class BlockHasher:
    """Of the blocks of one pool. Any thread may call it, on its current stream."""

    def __init__(self, blocks: Tensor) -> None:
        """`blocks`: `[num_blocks, block_bytes]`, uint8, contiguous. Raises ValueError for a size it cannot hash."""
        num_bytes = blocks.shape[1]
        if num_bytes < _SHORTEST_BYTES or num_bytes % 8:
            raise ValueError(f"a block has {num_bytes} bytes, not a multiple of 8 from {_SHORTEST_BYTES} on")
        self._blocks = blocks.view(torch.int64)
        self._table = torch.from_numpy(np.array(_TABLE, np.uint64).view(np.int64)).to(blocks.device)
        self._num_rounds, left_bytes = divmod(num_bytes - 1, _ROUND_BYTES)
        self._num_stripes = left_bytes // _STRIPE_BYTES

    def __call__(self, block_ids: Sequence[int]) -> list[int]:
        """The checksum of each, in [0, 2**64); waits for the GPU."""
        ids = torch.tensor(block_ids, dtype=torch.int64).to(self._blocks.device)
        found = torch.empty_like(ids)
        lengths = (self._blocks.shape[1], self._num_rounds, self._num_stripes)
        _hash[(len(block_ids),)](self._blocks, ids, self._table, found, *lengths, num_warps=1)
        checksums: list[int] = found.cpu().numpy().view(np.uint64).tolist()
        return checksums


def _secret(start: int, words: int) -> list[int]:
    return [int.from_bytes(_SECRET[at : at + 8], "little") for at in range(start, start + 8 * words, 8)]


_TABLE = [
    *_secret(0, 24),
    *_secret(121, 8),
    *_secret(11, 8),
    *(_PRIME32[2], *_PRIME64[:4], _PRIME32[1], _PRIME64[4], _PRIME32[0]),
    *(_PRIME32[0], _PRIME64[0], _AVALANCHE),
]
