"""Which block of the host tier goes next when there must be room, and how much each tenant has."""

from __future__ import annotations

from collections.abc import Callable

from kvstore.store.host_block import HostBlock
from kvstore.store.lru import LruHeap


class Candidates:
    """Blocks that may be evicted, the least recently used first: of all, and of each named tenant.

    A tenant at his quota makes room among his own.
    """

    def __init__(self, is_evictable: Callable[[HostBlock], bool], max_tenant_blocks: int) -> None:
        self._is_evictable = is_evictable
        self._max_tenant_blocks = max_tenant_blocks
        self._all: LruHeap[HostBlock] = LruHeap(is_evictable)
        self._of_tenant: dict[str, LruHeap[HostBlock]] = {}
        self.tenant_blocks: dict[str, int] = {}  # of named tenants, evictable or not

    def add(self, block: HostBlock) -> None:
        """If it is one."""
        if self._is_evictable(block):
            self._all.add(block)
            if block.tenant:
                self._of_tenant.setdefault(block.tenant, LruHeap(self._is_evictable)).add(block)

    def next(self, tenant: str, *, any_free: bool) -> HostBlock | None:
        """The block to evict for one more of this tenant; None if there is room, or nothing can go."""
        if self.is_full(tenant):
            heap = self._of_tenant.get(tenant)
            return None if heap is None else heap.peek()
        return None if any_free else self._all.peek()

    def is_full(self, tenant: str) -> bool:
        """Whether this tenant is at his quota."""
        return bool(tenant) and self.tenant_blocks.get(tenant, 0) >= self._max_tenant_blocks

    def count(self, block: HostBlock, change: int) -> None:
        """A block has come (+1) or gone (-1)."""
        tenant = block.tenant
        if not tenant:
            return
        self.tenant_blocks[tenant] = self.tenant_blocks.get(tenant, 0) + change
        if not self.tenant_blocks[tenant]:
            del self.tenant_blocks[tenant]
            self._of_tenant.pop(tenant, None)
