"""Numbered KV events of one life of a sender: apply each once and in order, and notice what was lost."""

from __future__ import annotations


class EventCursor:
    """Where a reader stands. One for each life of the sender, or session with it: numbers say nothing across two.

    `ValueError` means that the picture may be wrong: the reader needs a new snapshot, and a new cursor.
    """

    __slots__ = ("_next",)

    def __init__(self) -> None:
        self._next: int | None = None  # None: a snapshot must come first

    def accept(self, sequence: int, *, snapshot: bool = False) -> bool:
        """Whether to apply the event; False for one that came before, or that a snapshot has in it already.

        Raises:
            ValueError: an event before it is missing.
        """
        if self._next is None and not snapshot:
            raise ValueError(f"KV event {sequence} came before a snapshot")
        if self._next is not None and sequence < self._next:
            return False
        if not snapshot and sequence != self._next:
            raise ValueError(f"KV event {sequence} came when {self._next} was due")
        self._next = sequence + 1
        return True
