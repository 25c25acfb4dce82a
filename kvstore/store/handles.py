"""What a worker holds of the store: leases on blocks it reads, slots it writes."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from kvstore.keys import BlockKey
from kvstore.store.tier import Tier
from kvstore.transfer.transport import Buffer


class LeasedBlock(NamedTuple):
    """A block to copy out. Its bytes are right if the copy has this `block_checksum`."""

    key: BlockKey
    data: Buffer  # uint8 [block_bytes] in the arena; not to be written
    checksum: int
    tier: Tier  # where it was when it was asked for


class SaveSlot(NamedTuple):
    """A reserved slot of the arena. It is the caller's alone until it is committed or abandoned."""

    key: BlockKey
    data: Buffer  # uint8 [block_bytes], writable
    slot: int
    generation: int


class Lease:
    """Blocks that stay where they are until `release`, or `expires_s` on the monotonic clock at the latest."""

    __slots__ = ("_give_back", "blocks", "expires_s")

    def __init__(self, blocks: tuple[LeasedBlock, ...], expires_s: float, give_back: Callable[[], None] | None) -> None:
        self.blocks = blocks
        self.expires_s = expires_s
        self._give_back = give_back

    @classmethod
    def empty(cls) -> Lease:
        return cls((), float("inf"), None)

    def release(self) -> None:
        """Idempotent; on the client's loop. The blocks must not be read afterwards."""
        give_back, self._give_back = self._give_back, None
        if give_back is not None:
            give_back()

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()
