"""Message tags: 48 bits of ticket id, then 16 bits that say which message of the ticket it is.

    tag = ticket_id << 16 | ordinal        ordinal n < 0xFFFF: the n-th block of the ticket;  0xFFFF: the manifest

A ticket id is never used twice on a link, so a late message of an old ticket matches no receive of a new one.
"""

from __future__ import annotations

MANIFEST = 0xFFFF
MAX_BLOCKS = MANIFEST  # ordinals 0 .. 0xFFFE
MAX_TICKET_ID = 2**48 - 1


def message_tag(ticket_id: int, ordinal: int) -> int:
    """The 64-bit tag of one message of a ticket; `ordinal` is a block's position or `MANIFEST`.

    Raises:
        ValueError: a part is out of range.
    """
    if not 0 <= ticket_id <= MAX_TICKET_ID:
        raise ValueError(f"ticket id must lie in [0, 2**48), got {ticket_id}")
    if not 0 <= ordinal <= MANIFEST:
        raise ValueError(f"ordinal must lie in [0, {MANIFEST}], got {ordinal}")
    return ticket_id << 16 | ordinal
