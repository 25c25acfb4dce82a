"""What stands between the host tier and those that bring blocks into it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from kvstore.keys import BlockKey
from kvstore.store.host_block import SlotRef
from kvstore.store.host_tier import HostTier
from kvstore.store.metrics import StoreMetrics
from kvstore.store.tier import Tier
from kvstore.transfer.transport import Buffer


class Landing(Protocol):
    """The host tier as those see it who bring blocks."""

    host: HostTier
    slots: Sequence[Buffer]
    metrics: StoreMetrics

    def begin_fetch(self, owner: str, key: BlockKey, parent: BlockKey | None, tenant: str) -> SlotRef | None:
        """A slot to write; None if the block is there, or has no room."""
        ...

    def commit_fetched(self, tier: Tier, landed: Sequence[tuple[SlotRef, int]]) -> int:
        """Publish blocks whose bytes were verified as they came in from `tier`; how many are new."""
        ...

    def publish_removed(self) -> None:
        """Tell whom it concerns what had to go."""
        ...


class RemoteTier(Protocol):
    """Blocks of other nodes. Neither method raises; both return in bounded time."""

    async def locate(self, keys: Sequence[BlockKey]) -> int:
        """How many leading keys other nodes have, as far as the index knows."""
        ...

    async def fetch(self, keys: Sequence[BlockKey], parent: BlockKey | None, until_s: float) -> int:
        """Bring leading blocks of what follows `parent` into the host tier, by `until_s`; how many came."""
        ...

    def announce(self, tier: Tier, keys: Sequence[BlockKey]) -> None:
        """This node has these from now on."""
        ...
