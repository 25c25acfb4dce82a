"""The checksum of a block: xxh3-64, which finds damage and misplacement, not forgery (the data plane is trusted)."""

from __future__ import annotations

import xxhash

from kvstore.transfer.transport import Buffer


def block_checksum(data: Buffer) -> int:
    """xxh3-64 of the block's bytes, in [0, 2**64)."""
    return xxhash.xxh3_64_intdigest(data.data)
