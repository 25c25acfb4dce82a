"""A load: what is leased for one caller, and where it came from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from kvstore.keys import BlockKey
from kvstore.store.host_block import HostBlock
from kvstore.store.tier import Tier


@dataclass(frozen=True, slots=True)
class Loading:
    """A load under way: `blocks`, of the leading run of `keys`, are leased; `brought` says which came from where."""

    lease_id: int
    keys: Sequence[BlockKey]
    until_s: float
    blocks: list[HostBlock]
    brought: dict[BlockKey, Tier] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Loaded:
    """`tiers[n]` is where `blocks[n]` was when it was asked for. Without blocks there is no lease (`lease_id` 0)."""

    lease_id: int
    blocks: list[HostBlock]
    tiers: bytes
