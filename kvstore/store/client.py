"""A worker's side of the store: leases to read blocks, slots to write them, both straight in the node's shared memory.

    client = await StoreClient.attach(socket_path, fingerprint=..., block_bytes=..., owner="prefill-0")
    lease = await client.load(keys, deadline_s=0.2)
    for block in lease.blocks:
        np.copyto(mine, block.data)                # then block_checksum(mine) == block.checksum, or report_corrupt
    lease.release()

                    ┌────────── the stream ends, or a call is late ──────────┐
    DETACHED ── Attach answered ──> ATTACHED                                 v
        ^                             └──────────────────────────────────> DETACHED: every call is a miss, at once
        └── in the background, until `close`

A store that is lost, frozen or full is never an error of the caller: look-ups miss, saves do nothing. Use on the
asyncio loop only; the buffers may be read and written by any thread.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from kvstore.errors import Unavailable
from kvstore.keys import BlockKey
from kvstore.store import store_pb2 as pb
from kvstore.store.arena import ArenaMap
from kvstore.store.handles import Lease, LeasedBlock, SaveSlot
from kvstore.store.store_pb2_grpc import StoreStub
from kvstore.store.tier import Tier
from kvstore.store.wire import join_keys, join_parents

log = logging.getLogger(__name__)

CALL_TIMEOUT_S = 0.4  # of a call that waits for nothing but the node
ATTACH_TIMEOUT_S = 30.0  # the first worker waits while the node takes its memory
_BACKOFF_S = (0.05, 0.1, 0.2, 0.5, 1.0)
_CHANNEL_OPTIONS = (
    ("grpc.max_send_message_length", 16 << 20),
    ("grpc.max_receive_message_length", 16 << 20),
    # A node that comes back is found soon: gRPC's own pauses grow to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.use_local_subchannel_pool", 1),
)
# It is late, gone, or one that was started anew and does not know us.
_SESSION_OVER = (
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.FAILED_PRECONDITION,
)
_REFUSALS = (grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.UNIMPLEMENTED)

_TIERS = {tier.value: tier for tier in Tier}


class _Attachment:
    """One session with one life of the node."""

    def __init__(self, attached: pb.Attached, arena: ArenaMap | None) -> None:
        self.session_id = attached.session_id
        self.lease_s = attached.lease_s
        self.arena = arena


class StoreClient:
    """Create with `attach`."""

    def __init__(self, socket_path: str | Path, fingerprint: bytes, block_bytes: int, owner: str) -> None:
        self._hello = pb.AttachRequest(owner=owner, pid=os.getpid(), fingerprint=fingerprint, block_bytes=block_bytes)
        self._channel = grpc.aio.insecure_channel(f"unix:{socket_path}", options=_CHANNEL_OPTIONS)
        self._stub = StoreStub(self._channel)
        self._attachment: _Attachment | None = None
        self._arena_path = ""
        self._arena: ArenaMap | None = None
        self._stream: Any = None
        self._task: asyncio.Task[None] | None = None
        self._to_release: list[int] = []
        self._writing: set[tuple[int, int]] = set()  # slot and generation of what the callers may still write
        self._releasing = False
        self._closing = False
        self._tasks: set[asyncio.Task[Any]] = set()
        self._first: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    @classmethod
    async def attach(cls, socket_path: str | Path, *, fingerprint: bytes, block_bytes: int, owner: str) -> StoreClient:
        """Join the node that listens on `socket_path`; the first worker decides the node's block geometry.

        A node that is not there (yet) gives a detached client, which keeps trying.

        Args:
            fingerprint: 16 bytes, `BlockGeometry.fingerprint`.
            block_bytes: bytes of one block.
            owner: names this worker in the node's ledger.

        Raises:
            Unavailable: the node refuses; the message says why (it serves another model or block layout).
        """
        client = cls(socket_path, fingerprint, block_bytes, owner)
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
        return self._attachment is not None

    # --- reading -----------------------------------------------------------------------------------------------------

    async def lookup(self, keys: Sequence[BlockKey]) -> list[Tier]:
        """The tier of each block of the longest leading run of `keys` held anywhere; empty is a miss.

        REMOTE is a hint of the index. Nothing is held for the caller. Takes at most `CALL_TIMEOUT_S`.
        """
        if self._attachment is None or not keys:
            return []
        reply = await self._call(self._stub.Lookup, pb.LookupRequest(keys=join_keys(keys)), CALL_TIMEOUT_S)
        return [] if reply is None else [Tier(number) for number in reply.tiers]

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
        if attachment is None or attachment.arena is None or not keys:
            return Lease.empty()
        asked_s = time.monotonic()
        request = pb.LoadRequest(session_id=attachment.session_id, keys=join_keys(keys), deadline_s=deadline_s)
        reply = await self._call(self._stub.Load, request, deadline_s + CALL_TIMEOUT_S)
        if reply is None or not reply.lease_id:
            return Lease.empty()
        slots = attachment.arena.slots
        # There may be 2,000 blocks: constructors of named tuples and enums would be most of the call.
        fields = zip(keys, map(slots.__getitem__, reply.slots), reply.checksums, map(_TIERS.get, reply.tiers))  # noqa: B905
        blocks = tuple(map(LeasedBlock._make, fields))
        lease_id = reply.lease_id
        return Lease(blocks, asked_s + attachment.lease_s, lambda: self._release(attachment, lease_id))

    async def report_corrupt(self, keys: Sequence[BlockKey]) -> None:
        """The copies of these leased blocks did not have their checksums: the node checks and drops them."""
        if self._attachment is not None and keys:
            await self._call(self._stub.ReportCorrupt, pb.ReportCorruptRequest(keys=join_keys(keys)), CALL_TIMEOUT_S)

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
        """
        nothing: list[SaveSlot | None] = [None] * len(entries)
        attachment = self._attachment
        if attachment is None or attachment.arena is None or not entries:
            return nothing
        request = pb.BeginSaveRequest(
            session_id=attachment.session_id,
            keys=join_keys([key for key, _ in entries]),
            parents=join_parents([parent for _, parent in entries]),
            tenant=tenant,
        )
        call = asyncio.ensure_future(self._call(self._stub.BeginSave, request, CALL_TIMEOUT_S))
        try:
            reply = await asyncio.shield(call)
        except asyncio.CancelledError:
            call.add_done_callback(self._abandon_unseen)
            raise
        if reply is None:
            return nothing
        slots = attachment.arena.slots
        begun = [
            None if slot < 0 else SaveSlot(key, slots[slot], slot, generation)
            for (key, _), slot, generation in zip(entries, reply.slots, reply.generations, strict=True)
        ]
        self._writing.update((slot.slot, slot.generation) for slot in begun if slot is not None)
        return begun

    async def commit_save(self, saved: Sequence[tuple[SaveSlot, int]]) -> None:
        """Publish blocks; each with the `block_checksum` of what was written. Parents before children."""
        self._writing.difference_update((slot.slot, slot.generation) for slot, _ in saved)
        if self._attachment is None or not saved:
            return
        request = pb.CommitSaveRequest(
            slots=[slot.slot for slot, _ in saved],
            generations=[slot.generation for slot, _ in saved],
            checksums=[checksum for _, checksum in saved],
        )
        await self._call(self._stub.CommitSave, request, CALL_TIMEOUT_S)

    async def abandon_save(self, slots: Sequence[SaveSlot]) -> None:
        """Give slots back unpublished; the caller writes to them no more."""
        self._writing.difference_update((slot.slot, slot.generation) for slot in slots)
        if self._attachment is None or not slots:
            return  # the node learns it when we attach again
        request = pb.AbandonSaveRequest(
            slots=[slot.slot for slot in slots], generations=[slot.generation for slot in slots]
        )
        await self._call(self._stub.AbandonSave, request, CALL_TIMEOUT_S)

    async def close(self) -> None:
        """Leave; leases end. Slots that are neither committed nor abandoned come back when this process ends."""
        self._closing = True
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._channel.close(None)

    # --- inside ------------------------------------------------------------------------------------------------------

    def _abandon_unseen(self, call: asyncio.Future[Any]) -> None:
        """The caller was cancelled before it saw its slots."""
        reply = None if call.cancelled() or call.exception() is not None else call.result()
        if reply is not None:
            held = [(slot, number) for slot, number in zip(reply.slots, reply.generations, strict=True) if slot >= 0]
            request = pb.AbandonSaveRequest(
                slots=[slot for slot, _ in held], generations=[number for _, number in held]
            )
            self._background(self._call(self._stub.AbandonSave, request, CALL_TIMEOUT_S))

    def _background(self, what: Coroutine[Any, Any, Any]) -> None:
        task = asyncio.create_task(what)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _release(self, attachment: _Attachment, lease_id: int) -> None:
        """Releases of one turn of the loop go together; a lease that is lost on the way ends by itself."""
        if self._attachment is not attachment:
            return
        self._to_release.append(lease_id)
        if not self._releasing:
            self._releasing = True
            self._background(self._send_releases())

    async def _send_releases(self) -> None:
        while self._to_release:
            lease_ids, self._to_release = self._to_release, []
            await self._call(self._stub.Release, pb.ReleaseRequest(lease_ids=lease_ids), CALL_TIMEOUT_S)
        self._releasing = False

    async def _call(self, method: Callable[..., Any], request: Any, timeout_s: float) -> Any:
        """The reply, or None if the node gave none; a node that is late or gone is left until it attaches us again."""
        try:
            return await method(request, timeout=timeout_s)
        except grpc.aio.AioRpcError as error:
            if error.code() in _SESSION_OVER:
                self._detach(error.details() or error.code().name)
            else:
                log.warning("the store refused a call: %s", error.details())
            return None

    def _map(self, attached: pb.Attached) -> ArenaMap | None:
        """The node's arena; the same mapping as before if it is the same life of the node. Raises OSError."""
        if attached.arena_path != self._arena_path:
            self._arena_path, self._arena = "", None
            if attached.arena_path:
                self._arena = ArenaMap(Path(attached.arena_path), attached.num_slots, self._hello.block_bytes)
                self._arena_path = attached.arena_path
                self._background(asyncio.to_thread(self._arena.populate))
        return self._arena

    def _detach(self, reason: str) -> None:
        if self._attachment is not None:
            level = logging.DEBUG if self._closing else logging.WARNING
            log.log(level, "the store node does not answer (%s): every look-up misses until it is back", reason)
            self._attachment = None
            self._to_release.clear()
        if self._stream is not None:
            self._stream.cancel()

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
        del self._hello.writing_slots[:], self._hello.writing_generations[:]
        self._hello.writing_slots.extend(slot for slot, _ in self._writing)
        self._hello.writing_generations.extend(generation for _, generation in self._writing)
        stream = self._stream = self._stub.Attach(self._hello)
        try:
            async with asyncio.timeout(ATTACH_TIMEOUT_S):
                attached = await stream.read()
            if not isinstance(attached, pb.Attached):
                return ""
            self._attachment = _Attachment(attached, self._map(attached))
            self._hello.previous_session_id = attached.session_id
            log.info("attached to the store: %d slots in %s", attached.num_slots, attached.arena_path or "no host tier")
            if not self._first.done():
                self._first.set_result(None)
            await stream.read()  # nothing more comes: it returns when the session is over
        except grpc.aio.AioRpcError as error:
            if error.code() in _REFUSALS:
                log.warning("the store refuses us: %s", error.details())
                return error.details() or error.code().name
            if self._attachment is None:
                return ""
        except (TimeoutError, OSError) as error:  # OSError: the arena cannot be mapped
            log.warning("cannot attach to the store: %s", error)
            return ""
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            return ""  # `_detach` ended the stream
        finally:
            stream.cancel()
            self._detach("the session ended")
        return None
