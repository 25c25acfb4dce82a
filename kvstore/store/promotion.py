"""From disk into the host tier. A block comes once, however many wait for it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Sequence

from kvstore.keys import BlockKey
from kvstore.store.disk_tier import DiskTier
from kvstore.store.host_block import SlotRef
from kvstore.store.landing import Landing
from kvstore.store.tier import Tier

_OWNER = "promote"
_BATCH_BLOCKS = 256  # a load that ends early has not moved much more than it gave


class Promotion:
    """Use on the node's loop."""

    def __init__(self, landing: Landing, disk: DiskTier) -> None:
        self._landing = landing
        self._disk = disk
        self._arriving: dict[BlockKey, asyncio.Future[None]] = {}
        self._tasks: set[asyncio.Task[int]] = set()

    def has(self, key: BlockKey) -> bool:
        """Whether it is on its way, or can be."""
        return key in self._arriving or (key in self._disk and not self._landing.host.is_writing(key))

    async def bring(self, keys: Sequence[BlockKey], until_s: float) -> None:
        """Have the first of `keys`, which it `has`, and more in the host tier. Raises TimeoutError at `until_s`."""
        arriving = self._arriving.get(keys[0])
        if arriving is None:
            task = asyncio.create_task(self._promote(self._on_disk_only(keys)))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            await _until(asyncio.shield(task), until_s)  # what is not needed any more is good for the next one
        else:
            await _until(asyncio.shield(arriving), until_s)

    async def settle(self) -> None:
        """Wait for what is under way."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    def _on_disk_only(self, keys: Sequence[BlockKey]) -> list[BlockKey]:
        run: list[BlockKey] = []
        for key in keys[:_BATCH_BLOCKS]:
            if key in self._arriving or key not in self._disk or self._landing.host.get(key) is not None:
                break
            run.append(key)
        return run

    async def _promote(self, keys: Sequence[BlockKey]) -> int:
        """From disk into host slots; how many came."""
        began_s = time.monotonic()
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        refs: list[SlotRef] = []
        for key in keys:
            ref = self._landing.begin_fetch(_OWNER, key, self._disk.parent(key), self._disk.tenant(key))
            if ref is None:
                break
            refs.append(ref)
            self._arriving[key] = done
        self._landing.publish_removed()
        keys = keys[: len(refs)]
        try:
            checksums = await self._disk.read(keys, [self._landing.slots[ref.slot] for ref in refs])
            good = [(ref, checksum) for ref, checksum in zip(refs, checksums, strict=True) if checksum is not None]
            count = self._landing.commit_fetched(Tier.DISK, good)
            if len(good) < len(refs):
                self._landing.metrics.corrupt(Tier.DISK, len(refs) - len(good))
            self._landing.metrics.fetched(Tier.DISK, count * self._landing.host.block_bytes, time.monotonic() - began_s)
            return count
        finally:
            for key, ref in zip(keys, refs, strict=True):
                self._landing.host.abandon(ref)  # of a committed one it is nothing
                del self._arriving[key]
            self._landing.publish_removed()
            done.set_result(None)


async def _until(what: Awaitable[object], until_s: float) -> None:
    """Raises TimeoutError."""
    await asyncio.wait_for(what, max(0.0, until_s - time.monotonic()))
