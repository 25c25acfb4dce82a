"""Which store node holds which block in which tier, from the nodes' KV events. Pure.

Two rows of bits a node in one `PrefixIndex`: what its host tier holds, and what it holds at all. A chain lies in the
host tier up to some block, and on disk behind it, so the two lengths say how much comes from where. A block that leaves
one tier may still be in the other: that is why each node's tiers are kept by key.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from kvstore.keys import BlockKey
from kvstore.store.tier import Tier
from router.events import EventCursor
from router.index import PrefixIndex
from router.policy.roster import Numbers

MAX_NODES = 256
MAX_KEYS = 1 << 21  # of one node; what is more is not known of it, and counted
_HOST, _ANY = 0, 1  # rows of a node


@dataclass(slots=True)
class _Node:
    """In the snapshot, events are taken as they come; behind it each must follow the one before."""

    events: EventCursor = field(default_factory=EventCursor)
    complete: bool = False
    tiers: dict[BlockKey, int] = field(default_factory=dict)  # by key: the bits of its tiers


class Stored(NamedTuple):
    """Leading blocks of a request that nodes hold.

    Attributes:
        rows: in the host tier of node 0, anywhere on node 0, in the host tier of node 1, ...; the last two are zero.
        most: that any node holds.
    """

    rows: Numbers
    most: int

    def on(self, node: int) -> int:
        """Anywhere on a node; -1 is none."""
        return int(self.rows[2 * node + _ANY])


class StoreIndex:
    """Nodes are small integers, below MAX_NODES, that the caller hands out and reuses."""

    def __init__(self) -> None:
        self._index = PrefixIndex()
        self._nodes: dict[int, _Node] = {}
        self.dropped_keys = 0  # beyond MAX_KEYS

    def __len__(self) -> int:
        """Blocks of all nodes, each node's counted."""
        return sum(len(node.tiers) for node in self._nodes.values())

    def join(self, node: int) -> None:
        """Its events come from here on, a snapshot first; nothing counts before that is complete."""
        self.leave(node)
        self._nodes[node] = _Node()

    def leave(self, node: int) -> None:
        self._nodes.pop(node, None)
        for row in (_HOST, _ANY):
            self._index.remove_worker(2 * node + row)

    def stored(self, node: int, sequence: int, tier: Tier, keys: Sequence[BlockKey]) -> None:
        """Raises ValueError: events were lost before it."""
        known = self._nodes[node]
        if not self._accepts(known, sequence):
            return
        room = max(0, MAX_KEYS - len(known.tiers))
        self.dropped_keys += max(0, len(keys) - room)
        keys = keys[:room]
        bit = 1 << tier
        for key in keys:
            known.tiers[key] = known.tiers.get(key, 0) | bit
        if known.complete:
            self._show(node, tier, keys)

    def removed(self, node: int, sequence: int, tier: Tier, keys: Sequence[BlockKey]) -> None:
        """Raises ValueError: events were lost before it."""
        known = self._nodes[node]
        if self._accepts(known, sequence):
            self._remove(node, known, tier, keys)

    def cleared(self, node: int, sequence: int, tier: Tier) -> None:
        """Raises ValueError: events were lost before it."""
        known = self._nodes[node]
        if self._accepts(known, sequence):
            bit = 1 << tier
            self._remove(node, known, tier, [key for key, tiers in known.tiers.items() if tiers & bit])

    def snapshot_ended(self, node: int, sequence: int) -> None:
        """What came before is all that the node held at `sequence`."""
        known = self._nodes[node]
        known.events.accept(sequence, snapshot=True)
        known.complete = True
        for tier in (Tier.HOST, Tier.DISK):
            bit = 1 << tier
            self._show(node, tier, [key for key, tiers in known.tiers.items() if tiers & bit])

    def match(self, keys: Sequence[BlockKey]) -> Stored | None:
        """None: no node holds any of it."""
        found = self._index.match(keys).by_slot() if self._nodes else None
        if not found:
            return None
        rows = np.zeros(2 * (MAX_NODES + 1))
        for row, blocks in found.items():
            rows[row] = blocks
        return Stored(rows, max(found.values()))

    @staticmethod
    def _accepts(known: _Node, sequence: int) -> bool:
        return not known.complete or known.events.accept(sequence)

    def _show(self, node: int, tier: Tier, keys: Sequence[BlockKey]) -> None:
        if tier is Tier.HOST:
            self._index.stored(2 * node + _HOST, keys)
        self._index.stored(2 * node + _ANY, keys)

    def _remove(self, node: int, known: _Node, tier: Tier, keys: Sequence[BlockKey]) -> None:
        bit = 1 << tier
        gone: list[BlockKey] = []
        for key in keys:
            tiers = known.tiers.get(key, 0) & ~bit
            if tiers:
                known.tiers[key] = tiers
            elif key in known.tiers:
                del known.tiers[key]
                gone.append(key)
        if tier is Tier.HOST:
            self._index.removed(2 * node + _HOST, keys)
        self._index.removed(2 * node + _ANY, gone)
