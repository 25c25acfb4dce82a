"""From host to disk, behind the back of everybody: a bounded queue and one writer.

Chains are written from their beginning, so what is on disk can be found from its first block on. A block that waits is
leased, and written straight from its slot; one whose slot is needed now is copied first. What does not fit the budget
is not written: a store that cannot keep up forgets, it does not stall.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import replace

from kvstore.keys import BlockKey
from kvstore.store.disk_tier import DiskTier
from kvstore.store.host_block import HostBlock
from kvstore.store.host_tier import HostTier
from kvstore.store.metrics import StoreMetrics
from kvstore.store.segment_file import DiskWrite
from kvstore.store.tier import Tier
from kvstore.transfer.transport import Buffer

_OWNER = "write-behind"


class WriteBehind:
    """Use on the node's loop. `backlog_bytes` never exceeds `budget_bytes`."""

    def __init__(
        self,
        host: HostTier,
        slots: Sequence[Buffer],
        disk: DiskTier,
        metrics: StoreMetrics,
        budget_bytes: int,
        batch_bytes: int,
    ) -> None:
        self.backlog_bytes = 0
        self._host = host
        self._slots = slots
        self._disk = disk
        self._metrics = metrics
        self._budget_bytes = budget_bytes
        self._batch_blocks = max(1, batch_bytes // host.block_bytes)
        self._queue: deque[tuple[DiskWrite, int]] = deque()  # with the lease on the slot; 0: a copy
        self._waiting: set[BlockKey] = set()
        self._wake = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()

    def wants(self, key: BlockKey) -> bool:
        return key not in self._disk and key not in self._waiting

    def add_chain(self, block: HostBlock) -> bool:
        """A committed block behind its ancestors; False if not all of them fit the budget now."""
        self.add([*reversed(self._ancestors(block)), block])
        return not self.wants(block.key)

    def add(self, blocks: Iterable[HostBlock]) -> None:
        """Committed blocks of a chain, parents first; those that are on disk or waiting are passed over."""
        for block in blocks:
            if not self.wants(block.key) or not self._has_room():
                continue
            lease_id = self._host.open_lease(_OWNER, time.monotonic(), float("inf"))
            if self._host.lease(lease_id, [block.key], touch=False):
                self._put(block, self._slots[block.ref.slot], lease_id)
            else:
                self._host.release(lease_id)

    def rescue(self, block: HostBlock) -> None:
        """A block that is about to be evicted: its ancestors first, then a copy of it."""
        self.add(reversed(self._ancestors(block)))
        if self.wants(block.key) and self._has_room():
            self._put(block, self._slots[block.ref.slot].copy(), 0)

    async def run(self) -> None:
        """Write until cancelled."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._queue:
                await self._write([self._queue.popleft() for _ in range(min(len(self._queue), self._batch_blocks))])
            self._idle.set()

    async def flush(self) -> None:
        """Wait until nothing waits; `run` must be running."""
        await self._idle.wait()

    def _ancestors(self, block: HostBlock) -> list[HostBlock]:
        """Those in the host tier that are not on disk, nearest first."""
        chain: list[HostBlock] = []
        parent = block.parent
        while parent is not None and (ancestor := self._host.get(parent)) is not None and self.wants(parent):
            chain.append(ancestor)
            parent = ancestor.parent
        return chain

    def _has_room(self) -> bool:
        if not self._disk.accepts_writes:
            self._metrics.not_written("breaker")
            return False
        if self.backlog_bytes + self._host.block_bytes > self._budget_bytes:
            self._metrics.not_written("budget")
            return False
        return True

    def _put(self, block: HostBlock, data: Buffer, lease_id: int) -> None:
        write = DiskWrite(block.key, block.parent, block.checksum, data, block.tenant)
        self._queue.append((write, lease_id))
        self._waiting.add(block.key)
        self.backlog_bytes += self._host.block_bytes
        self._idle.clear()
        self._wake.set()

    async def _write(self, batch: list[tuple[DiskWrite, int]]) -> None:
        began_s = time.monotonic()
        try:
            wanted: list[DiskWrite] = []
            coming: set[BlockKey] = set()
            for write, _ in batch:
                parent = write.parent
                if parent is None or parent in self._disk or parent in coming:
                    wanted.append(write)
                elif self._host.get(parent) is None:  # the root of the chain, or what is as good as one
                    wanted.append(replace(write, parent=None))
                else:
                    self._metrics.not_written("parent")
                    continue
                coming.add(write.key)
            written = await self._disk.write(wanted)
            if written:
                self._metrics.saved(Tier.DISK, written * self._host.block_bytes, time.monotonic() - began_s)
            if written < len(wanted):
                self._metrics.not_written("refused", len(wanted) - written)
        finally:
            for write, lease_id in batch:
                self._waiting.discard(write.key)
                self.backlog_bytes -= self._host.block_bytes
                if lease_id:
                    self._host.release(lease_id)
