"""A block of the host tier and the slot that it is in."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from kvstore.keys import BlockKey


class Pin(Enum):
    NONE = ""
    SOFT = "soft"
    HARD = "hard"


@dataclass(frozen=True, slots=True)
class SlotRef:
    """A slot in one of its lives."""

    slot: int
    generation: int


@dataclass(slots=True, eq=False)
class HostBlock:
    """A block from `begin` on. `leases` counts readers, `children` blocks in this tier that follow it."""

    key: BlockKey
    parent: BlockKey | None
    tenant: str
    ref: SlotRef
    owner: str  # of the writer; "" once committed
    tick: int
    checksum: int = 0
    touches: int = 1  # a save is the first
    leases: int = 0
    children: int = 0
    pin: Pin = Pin.NONE
    pin_expires_s: float = 0.0
    committed: bool = False
    quarantined: bool = False

    @property
    def rank(self) -> tuple[int, int]:
        return (0 if self.pin is Pin.NONE else 1, self.tick)
