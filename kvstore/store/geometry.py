"""What all blocks of one node have in common."""

from __future__ import annotations

from dataclasses import dataclass

from kvstore.store.segment import FINGERPRINT_BYTES

MAX_BLOCK_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class Geometry:
    """The fingerprint names model, dtype and layout; blocks of another one mean nothing here."""

    fingerprint: bytes
    block_bytes: int

    def __post_init__(self) -> None:
        if len(self.fingerprint) != FINGERPRINT_BYTES:
            raise ValueError(f"a fingerprint has {FINGERPRINT_BYTES} bytes, got {len(self.fingerprint)}")
        if not 0 < self.block_bytes <= MAX_BLOCK_BYTES:
            raise ValueError(f"a block has 1 to {MAX_BLOCK_BYTES} bytes, got {self.block_bytes}")
