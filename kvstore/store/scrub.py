"""Reading what the host tier holds, to see whether it still has its checksums."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Sequence

from kvstore.store.host_block import HostBlock
from kvstore.store.host_tier import HostTier
from kvstore.transfer.checksum import block_checksum
from kvstore.transfer.transport import Buffer


async def drop_corrupt(host: HostTier, slots: Sequence[Buffer], blocks: Iterable[HostBlock]) -> int:
    """Drop those of these blocks whose bytes are wrong; how many. Each is leased while it is read."""
    loop = asyncio.get_running_loop()
    corrupt = 0
    for block in blocks:
        lease_id = host.open_lease("verify", time.monotonic(), float("inf"))
        if host.lease(lease_id, [block.key], touch=False) == [block]:
            found = await loop.run_in_executor(None, block_checksum, slots[block.ref.slot])
            if found != block.checksum and host.get(block.key) is block:
                host.drop(block.key)
                corrupt += 1
        host.release(lease_id)
    return corrupt
