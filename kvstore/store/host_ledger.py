"""Who has the slots of the host tier."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from kvstore.store.host_block import HostBlock


@dataclass(frozen=True, slots=True)
class LeaseEntry:
    owner: str
    num_blocks: int
    age_s: float
    expires_in_s: float


@dataclass(frozen=True, slots=True)
class HostLedger:
    """Every slot once: `free + cached + leased + writing + quarantined == total` (design invariant I1)."""

    total: int
    free: int
    cached: int
    leased: int
    writing: int
    quarantined: int
    leases: tuple[LeaseEntry, ...]

    @property
    def sums(self) -> bool:
        return self.free + self.cached + self.leased + self.writing + self.quarantined == self.total

    @property
    def idle(self) -> bool:
        return self.sums and self.free + self.cached == self.total


def count_slots(
    free: Collection[int], blocks: Iterable[HostBlock], total: int, leases: Iterable[LeaseEntry]
) -> HostLedger:
    """Counted from the slots themselves: a mistake shows as a sum that is off."""
    counts = {"free": len(set(free)), "cached": 0, "leased": 0, "writing": 0, "quarantined": 0}
    for block in blocks:
        if block.quarantined:
            counts["quarantined"] += 1
        elif not block.committed:
            counts["writing"] += 1
        else:
            counts["leased" if block.leases else "cached"] += 1
    return HostLedger(total, **counts, leases=tuple(leases))
