"""Where a block is, as seen by one store node."""

from __future__ import annotations

from enum import IntEnum


class Tier(IntEnum):
    """The numbers are those on the wire and in the index; cheaper to read comes first."""

    HOST = 1  # the shared-memory arena of this machine
    DISK = 2  # the segment files of this machine
    REMOTE = 3  # another node, or so the index says: that node decides

    @property
    def label(self) -> str:
        """For metrics and people."""
        return self.name.lower()
