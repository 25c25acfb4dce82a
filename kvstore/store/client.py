"""A worker's side of the store: leases to read blocks, slots to write them, both straight in the node's shared memory.

    client = await StoreClient.attach(socket_path, fingerprint=..., block_bytes=..., owner="prefill-0")
    lease = await client.load(keys, deadline_s=0.2)
    for block in lease.blocks:
        np.copyto(mine, block.data)                # then block_checksum(mine) == block.checksum, or report_corrupt
    lease.release()

                  ┌────── the connection ends, or a call is late ──────┐
    DETACHED ── WELCOME ──> ATTACHED                                   v
        ^                      └──────────────────────────────────> DETACHED: every call is a miss, at once
        └── in the background, until `close`

A store that is lost, frozen or full is never an error of the caller: look-ups miss, saves do nothing. Use on the
asyncio loop only; the buffers may be read and written by any thread.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from kvstore.errors import Unavailable
from kvstore.keys import BlockKey
from kvstore.store.arena import ArenaMap
from kvstore.store.connection import Connection
from kvstore.store.frames import BadFrame, Kind
from kvstore.store.handles import Lease, LeasedBlock, SaveSlot
from kvstore.store.messages import (
    NO_SLOT,
    Hello,
    LoadReply,
    Welcome,
    decode_refs,
    encode_begin,
    encode_commit,
    encode_leases,
    encode_load,
    encode_refs,
)
from kvstore.store.tier import Tier
from kvstore.store.wire import join_keys
from kvstore.transfer.transport import Buffer

log = logging.getLogger(__name__)

T = TypeVar("T")

CALL_TIMEOUT_S = 0.4  # of a call that waits for nothing but the node
ATTACH_TIMEOUT_S = 30.0  # the first worker waits while the node takes its memory
_BACKOFF_S = (0.05, 0.1, 0.2, 0.5, 1.0)
_TIERS = {tier.value: tier for tier in Tier}
_leased = partial(tuple.__new__, LeasedBlock)

OnArena = Callable[[Buffer], None]


class _Attachment:
    """One session with one life of the node."""

    def __init__(self, connection: Connection, welcome: Welcome, slots: Sequence[Buffer]) -> None:
        self.connection = connection
        self.lease_s = welcome.lease_s
        self.slots = slots  # none without a host tier


class StoreClient:
    """Create with `attach`."""

    def __init__(
        self, socket_path: str | Path, fingerprint: bytes, block_bytes: int, owner: str, on_arena: OnArena | None = None
    ) -> None:
        self._path = Path(socket_path)
        self._hello = Hello(owner, block_bytes, fingerprint)
        self._on_arena = on_arena
        self._attachment: _Attachment | None = None
        self._arena_path = ""
        self._arena: ArenaMap | None = None
        self._task: asyncio.Task[None] | None = None
        self._to_release: list[int] = []
        self._writing: set[tuple[int, int]] = set()  # slot and generation of what the callers may still write
        self._tasks: set[asyncio.Task[Any]] = set()
        self._first: asyncio.Future[None] = asyncio.get_running_loop().create_future()

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
            on_arena: called with the node's arena as it is mapped, and again with the next life's; on a thread.

        Raises:
            Unavailable: the node refuses; the message says why (it serves another model or block layout).
        """
        client = cls(socket_path, fingerprint, block_bytes, owner, on_arena)
        client._task = asyncio.create_task(client._keep_attached(), name=f"store session of {owner}")
        try:
            await client._first
        except BaseException:
            await client.close()
            raise
        return client

    @property
    def attached(self) -> bool:
        """Whether the node answers; while it does not, every call is a miss."""
        return self._attachment is not None and not self._attachment.connection.ended.done()

    # --- reading -----------------------------------------------------------------------------------------------------

    async def lookup(self, keys: Sequence[BlockKey]) -> list[Tier]:
        """The tier of each block of the longest leading run of `keys` held anywhere; empty is a miss.

        REMOTE is a hint of the index. Nothing is held for the caller. Takes at most `CALL_TIMEOUT_S`.
        """
        attachment = self._attachment
        if attachment is None or not keys:
            return []
        reply = await attachment.connection.call(Kind.LOOKUP, join_keys(keys), CALL_TIMEOUT_S)
        return [] if reply is None else [Tier(number) for number in reply]

    async def load(self, keys: Sequence[BlockKey], deadline_s: float) -> Lease:
        """Lease the leading run of `keys` in the host tier, fetching from disk and other nodes what is not there yet.

        Args:
            keys: a prefix chain, its first block first.
            deadline_s: seconds to wait at most; what is there by then is leased, the rest comes for the next caller.

        Returns:
            A lease of as many leading blocks as could be had, perhaps none. Copy, verify, release: it ends by itself
            at `expires_s`, after which a slot may hold other bytes, as the checksum would tell.
        """
        attachment = self._attachment
        if attachment is None or not attachment.slots or not keys:
            return Lease.empty()
        asked_s = time.monotonic()
        connection = attachment.connection

        def unseen(payload: bytes) -> None:
            connection.tell(Kind.RELEASE, encode_leases([LoadReply.decode(payload).lease_id]))

        request = encode_load(deadline_s, keys)
        payload = await connection.call(Kind.LOAD, request, deadline_s + CALL_TIMEOUT_S, unseen)
        reply = None if payload is None else _checked(connection, LoadReply.decode, payload)
        if reply is None or not reply.lease_id:
            return Lease.empty()
        # There may be 2,000 blocks: a line of Python for each would be most of the call.
        data = map(attachment.slots.__getitem__, reply.slots)
        fields = zip(keys, data, reply.checksums, map(_TIERS.__getitem__, reply.tiers))  # noqa: B905
        try:
            blocks = tuple(map(_leased, fields))
        except LookupError:
            connection.close("it names a slot or a tier that there is not")
            return Lease.empty()
        lease_id = reply.lease_id
        return Lease(blocks, asked_s + attachment.lease_s, lambda: self._release(attachment, lease_id))

    async def report_corrupt(self, keys: Sequence[BlockKey]) -> None:
        """The copies of these leased blocks did not have their checksums: the node checks and drops them."""
        if self._attachment is not None and keys:
            await self._attachment.connection.call(Kind.REPORT_CORRUPT, join_keys(keys), CALL_TIMEOUT_S)

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
        attachment = self._attachment
        if attachment is None or not attachment.slots or not entries:
            return nothing
        connection = attachment.connection

        def unseen(payload: bytes) -> None:
            held = [ref for ref in decode_refs(payload) if ref[0] != NO_SLOT]
            self._background(connection.call(Kind.ABANDON_SAVE, encode_refs(held), CALL_TIMEOUT_S))

        payload = await connection.call(Kind.BEGIN_SAVE, encode_begin(entries, tenant), CALL_TIMEOUT_S, unseen)
        refs = None if payload is None else _checked(connection, decode_refs, payload)
        slots = attachment.slots
        if refs is None or len(refs) != len(entries):
            return nothing
        self._writing.update(ref for ref in refs if ref[0] != NO_SLOT)
        return [
            None if slot == NO_SLOT else SaveSlot(key, slots[slot], slot, generation)
            for (key, _), (slot, generation) in zip(entries, refs, strict=True)
        ]

    async def commit_save(self, saved: Sequence[tuple[SaveSlot, int]]) -> None:
        """Publish blocks; each with the `block_checksum` of what was written. Parents before children."""
        refs = [(slot.slot, slot.generation) for slot, _ in saved]
        self._writing.difference_update(refs)
        if self._attachment is None or not saved:
            return
        payload = encode_commit(refs, [checksum for _, checksum in saved])
        await self._attachment.connection.call(Kind.COMMIT_SAVE, payload, CALL_TIMEOUT_S)

    async def abandon_save(self, slots: Sequence[SaveSlot]) -> None:
        """Give slots back unpublished; the caller writes to them no more."""
        refs = [(slot.slot, slot.generation) for slot in slots]
        self._writing.difference_update(refs)
        if self._attachment is None or not slots:
            return  # the node learns it when we attach again
        await self._attachment.connection.call(Kind.ABANDON_SAVE, encode_refs(refs), CALL_TIMEOUT_S)

    async def close(self) -> None:
        """Leave; leases end. Slots that are neither committed nor abandoned come back when this process ends."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # --- inside ------------------------------------------------------------------------------------------------------

    def _background(self, what: Coroutine[Any, Any, Any]) -> None:
        task = asyncio.create_task(what)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _release(self, attachment: _Attachment, lease_id: int) -> None:
        """Releases of one turn of the loop go together; a lease that is lost on the way ends by itself."""
        if self._attachment is not attachment:
            return
        if not self._to_release:
            asyncio.get_running_loop().call_soon(self._send_releases)
        self._to_release.append(lease_id)

    def _send_releases(self) -> None:
        lease_ids, self._to_release = self._to_release, []
        if self._attachment is not None and lease_ids:
            self._attachment.connection.tell(Kind.RELEASE, encode_leases(lease_ids))

    def _slots(self, welcome: Welcome) -> Sequence[Buffer]:
        """Of the node's arena; the same mapping as before if it is the same life of the node. Raises OSError."""
        if welcome.arena_path != self._arena_path:
            self._arena_path, self._arena = "", None
            if welcome.arena_path:
                self._arena = ArenaMap(Path(welcome.arena_path), welcome.num_slots, self._hello.block_bytes)
                self._arena_path = welcome.arena_path
                self._background(asyncio.to_thread(self._prepare, self._arena))
        return () if self._arena is None else self._arena.slots

    def _prepare(self, arena: ArenaMap) -> None:
        """On a thread."""
        arena.populate()
        if self._on_arena is not None:
            self._on_arena(arena.all)

    async def _keep_attached(self) -> None:
        """Attach, and again whenever the session has ended."""
        attempt = 0
        while True:
            refusal = await self._attach_once()
            if refusal and not self._first.done():
                self._first.set_exception(Unavailable(refusal))
                return
            if not self._first.done():
                self._first.set_result(None)
            attempt = 0 if refusal is None else attempt + 1
            await asyncio.sleep(_BACKOFF_S[min(attempt, len(_BACKOFF_S) - 1)])

    async def _attach_once(self) -> str | None:
        """One session from its start to its end. Returns why it did not come to be; "" if nobody was there."""
        try:
            connection = await Connection.open(self._path)
        except OSError:
            return ""
        try:
            hello = replace(self._hello, writing=tuple(self._writing))
            answer = await connection.call(Kind.HELLO, hello.encode(), ATTACH_TIMEOUT_S)
            if answer is None:
                if connection.refusal:
                    log.warning("the store refuses us: %s", connection.refusal)
                return connection.refusal
            welcome = Welcome.decode(answer)
            self._attachment = _Attachment(connection, welcome, self._slots(welcome))
            self._hello = replace(self._hello, previous_session=welcome.session_id)
            log.info("attached to the store: %d slots in %s", welcome.num_slots, welcome.arena_path or "no host tier")
            if not self._first.done():
                self._first.set_result(None)
            reason = await asyncio.shield(connection.ended)
            log.warning("the store node does not answer (%s): every look-up misses until it is back", reason)
        except (BadFrame, OSError) as error:  # OSError: the arena cannot be mapped
            log.warning("cannot attach to the store: %s", error)
            return ""
        finally:
            self._attachment = None
            self._to_release.clear()
            connection.close("this worker leaves")
        return None


def _checked(connection: Connection, decode: Callable[[bytes], T], payload: bytes) -> T | None:
    """None, and the session is over, if the node answers what is no answer."""
    try:
        return decode(payload)
    except BadFrame as error:
        connection.close(str(error))
        return None
