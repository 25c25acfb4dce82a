"""A worker's side of the store: leases to read blocks, slots to write them, both straight in the node's shared memory.

    client = await StoreClient.attach(socket_path, fingerprint=..., block_bytes=..., owner="prefill-0")
    lease = await client.load(keys, deadline_s=0.2)
    for block in lease.blocks:
        np.copyto(mine, block.data)                # then block_checksum(mine) == block.checksum, or report_corrupt
    lease.release()

What the host tier has is found in the arena's directory: no message is waited for. The node is asked for the rest.

A store that is lost, frozen or full is never an error of the caller: look-ups miss, saves do nothing. Use on the
asyncio loop only; the buffers may be read and written by any thread.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any

from kvstore.keys import BlockKey
from kvstore.store.attachment import Attaching, Attachment, OnArena, StoreNode
from kvstore.store.frames import Kind
from kvstore.store.handles import Lease, LeasedBlock, SaveSlot
from kvstore.store.messages import (
    NO_SLOT,
    Hello,
    LoadReply,
    decode_count,
    decode_refs,
    encode_begin,
    encode_commit,
    encode_leases,
    encode_load,
    encode_refs,
)
from kvstore.store.tier import Tier
from kvstore.store.wire import join_keys

CALL_TIMEOUT_S = 0.4  # of a call that waits for nothing but the node
_TIERS = {tier.value: tier for tier in Tier}
_leased = partial(tuple.__new__, LeasedBlock)


class StoreClient:
    """Create with `attach`."""

    def __init__(
        self, socket_path: str | Path, fingerprint: bytes, block_bytes: int, owner: str, on_arena: OnArena | None = None
    ) -> None:
        self._writing: set[tuple[int, int]] = set()  # slot and generation of what the callers may still write
        self._attaching = Attaching(Path(socket_path), Hello(owner, block_bytes, fingerprint), self._writing, on_arena)
        self._tasks: set[asyncio.Task[Any]] = set()

    @classmethod
    async def attach(
        cls,
        socket_path: str | Path,
        *,
        fingerprint: bytes,
        block_bytes: int,
        owner: str,
        on_arena: OnArena | None = None,
    ) -> StoreClient:
        """Join the node that listens on `socket_path`; the first worker decides the node's block geometry.

        A node that is not there (yet) gives a detached client, which keeps trying.

        Args:
            fingerprint: 16 bytes, `BlockGeometry.fingerprint`.
            block_bytes: bytes of one block.
            owner: names this worker in the node's ledger.
            on_arena: called with the node's arena as it is mapped, and with None when that life has ended; on a thread.

        Raises:
            Unavailable: the node refuses; the message says why (it serves another model or block layout).
        """
        client = cls(socket_path, fingerprint, block_bytes, owner, on_arena)
        try:
            await client._attaching.tried()
        except BaseException:
            await client.close()
            raise
        return client

    @property
    def node(self) -> StoreNode | None:
        """The node that it is attached to."""
        attachment = self._attaching.current
        return None if attachment is None else attachment.node

    def on_change(self, changed: Callable[[], None]) -> None:
        """Have `changed` called whenever `node` has changed."""
        self._attaching.changed = changed

    @property
    def attached(self) -> bool:
        """Whether the node answers; while it does not, every call is a miss."""
        return self._attaching.current is not None

    # --- reading -----------------------------------------------------------------------------------------------------

    async def lookup(self, keys: Sequence[BlockKey]) -> list[Tier]:
        """The tier of each block of the longest leading run of `keys` held anywhere; empty is a miss.

        REMOTE is a hint of the index. Nothing is held for the caller. Takes at most `CALL_TIMEOUT_S`.
        """
        attachment = self._attaching.current
        if attachment is None or not keys:
            return []
        if len(attachment.find(keys)[0]) == len(keys):
            return [Tier.HOST] * len(keys)
        reply = await attachment.connection.call(Kind.LOOKUP, join_keys(keys), CALL_TIMEOUT_S)
        return [] if reply is None else [Tier(number) for number in reply]

    async def load(self, keys: Sequence[BlockKey], deadline_s: float) -> Lease:
        """Lease the leading run of `keys` in the host tier, fetching from disk and other nodes what is not there yet.

        Args:
            keys: a prefix chain, its first block first.
            deadline_s: seconds to wait at most; what is there by then is leased, the rest comes for the next caller.

        Returns:
            A lease of as many leading blocks as could be had, perhaps none. Copy, verify, release. A slot may hold
            other bytes once the lease has ended, at `expires_s` at the latest, or before the node has heard of a lease
            that did not wait for it: then the copy has not the checksum.
        """
        attachment = self._attaching.current
        if attachment is None or not attachment.slots or not keys:
            return Lease.empty()
        asked_s = time.monotonic()
        slots, checksums = attachment.find(keys)
        if len(slots) == len(keys) and attachment.connection.keeps_up:
            return _lease(attachment, keys, slots, checksums, repeat(Tier.HOST), attachment.hold(keys), asked_s)
        reply = await self._ask_load(attachment, keys, deadline_s)
        if reply is None or not reply.lease_id:
            return Lease.empty()
        tiers = map(_TIERS.__getitem__, reply.tiers)
        try:
            return _lease(attachment, keys, reply.slots, reply.checksums, tiers, reply.lease_id, asked_s)
        except LookupError:
            attachment.connection.close("it names a slot or a tier that there is not")
            return Lease.empty()

    async def _ask_load(self, attachment: Attachment, keys: Sequence[BlockKey], deadline_s: float) -> LoadReply | None:
        connection = attachment.connection

        def unseen(payload: bytes) -> None:
            connection.tell(Kind.RELEASE, encode_leases([LoadReply.decode(payload).lease_id]))

        request = encode_load(deadline_s, keys)
        payload = await connection.call(Kind.LOAD, request, deadline_s + CALL_TIMEOUT_S, unseen)
        return None if payload is None else attachment.decoded(LoadReply.decode, payload)

    async def report_corrupt(self, keys: Sequence[BlockKey]) -> int:
        """The copies of these leased blocks did not have their checksums: the node checks them.

        Returns:
            How many had wrong bytes there too, and were dropped; the others had left their slots before they were read.
        """
        attachment = self._attaching.current
        if attachment is None or not keys:
            return 0
        reply = await attachment.connection.call(Kind.REPORT_CORRUPT, join_keys(keys), CALL_TIMEOUT_S)
        return (None if reply is None else attachment.decoded(decode_count, reply)) or 0

    # --- writing -----------------------------------------------------------------------------------------------------

    async def begin_save(
        self, entries: Sequence[tuple[BlockKey, BlockKey | None]], tenant: str = ""
    ) -> list[SaveSlot | None]:
        """Reserve a slot for each block: write `slot.data`, then commit or abandon it; nobody sees it before.

        Args:
            entries: (key, parent key) in the order of the chain; the parent of a chain's first block is its root key
                or None.
            tenant: whose quota the bytes count against; "" has none.

        Returns:
            One entry a block: None where the block is there already, is being written, or has no room.

        Raises:
            ValueError: too many blocks for one call, or too long a tenant's name.
        """
        nothing: list[SaveSlot | None] = [None] * len(entries)
        attachment = self._attaching.current
        if attachment is None or not attachment.slots or not entries:
            return nothing
        there = len(attachment.find([key for key, _ in entries])[0])
        if there == len(entries):
            return nothing
        refs = await self._ask_slots(attachment, entries[there:], tenant)
        if len(refs) != len(entries) - there:
            return nothing
        self._writing.update(ref for ref in refs if ref[0] != NO_SLOT)
        slots = attachment.slots
        return nothing[:there] + [
            None if slot == NO_SLOT else SaveSlot(key, slots[slot], slot, generation)
            for (key, _), (slot, generation) in zip(entries[there:], refs, strict=True)
        ]

    async def _ask_slots(
        self, attachment: Attachment, entries: Sequence[tuple[BlockKey, BlockKey | None]], tenant: str
    ) -> list[tuple[int, int]]:
        connection = attachment.connection

        def unseen(payload: bytes) -> None:
            held = [ref for ref in decode_refs(payload) if ref[0] != NO_SLOT]
            self._background(connection.call(Kind.ABANDON_SAVE, encode_refs(held), CALL_TIMEOUT_S))

        payload = await connection.call(Kind.BEGIN_SAVE, encode_begin(entries, tenant), CALL_TIMEOUT_S, unseen)
        return (None if payload is None else attachment.decoded(decode_refs, payload)) or []

    def publish(self, saved: Sequence[tuple[SaveSlot, int]]) -> None:
        """Have blocks published, each with the `block_checksum` of what was written, parents before children.

        The node is told and nobody waits: they are found as soon as it has read that.
        """
        attachment = self._attaching.current
        payload = self._written(saved)
        if attachment is not None and saved:
            attachment.connection.tell(Kind.COMMIT_SAVE, payload)

    async def commit_save(self, saved: Sequence[tuple[SaveSlot, int]]) -> None:
        """As `publish`, and wait until they are found."""
        attachment = self._attaching.current
        payload = self._written(saved)
        if attachment is not None and saved:
            await attachment.connection.call(Kind.COMMIT_SAVE, payload, CALL_TIMEOUT_S)

    def _written(self, saved: Sequence[tuple[SaveSlot, int]]) -> bytes:
        refs = [(slot.slot, slot.generation) for slot, _ in saved]
        self._writing.difference_update(refs)
        return encode_commit(refs, [checksum for _, checksum in saved])

    async def abandon_save(self, slots: Sequence[SaveSlot]) -> None:
        """Give slots back unpublished; the caller writes to them no more."""
        refs = [(slot.slot, slot.generation) for slot in slots]
        self._writing.difference_update(refs)
        attachment = self._attaching.current
        if attachment is not None and slots:  # without one the node learns it when we attach again
            await attachment.connection.call(Kind.ABANDON_SAVE, encode_refs(refs), CALL_TIMEOUT_S)

    async def close(self) -> None:
        """Leave; leases end. Slots that are neither committed nor abandoned come back when this process ends."""
        await self._attaching.close()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _background(self, what: Coroutine[Any, Any, Any]) -> None:
        task = asyncio.create_task(what)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _lease(
    attachment: Attachment,
    keys: Sequence[BlockKey],
    slots: Sequence[int],
    checksums: Sequence[int],
    tiers: Iterable[Tier],
    lease_id: int,
    asked_s: float,
) -> Lease:
    """Raises LookupError if there is no such slot or tier."""
    # There may be 2,000 blocks: a line of Python for each would be most of the call.
    data = map(attachment.slots.__getitem__, slots)
    blocks = tuple(map(_leased, zip(keys, data, checksums, tiers)))  # noqa: B905
    return Lease(blocks, asked_s + attachment.lease_s, partial(attachment.release, lease_id))
