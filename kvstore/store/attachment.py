"""One session of a worker with one life of its node, and the task that always has one if it can.

              ┌────── the connection ends, or a call is late ──────┐
DETACHED ── WELCOME ──> ATTACHED                                   v
    ^                      └──────────────────────────────────> DETACHED: every call is a miss, at once
    └── in the background, until `close`
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from kvstore.errors import Unavailable
from kvstore.keys import BlockKey
from kvstore.store.arena import ArenaMap
from kvstore.store.connection import LATE, Connection
from kvstore.store.frames import BadFrame, Kind
from kvstore.store.messages import TOLD, Hello, Welcome, encode_hold, encode_leases
from kvstore.transfer.transport import Buffer

log = logging.getLogger(__name__)

T = TypeVar("T")
OnArena = Callable[[Buffer | None], None]

ATTACH_TIMEOUT_S = 30.0  # the first worker waits while the node takes its memory
_BACKOFF_S = (0.05, 0.1, 0.2, 0.5, 1.0)


@dataclass(frozen=True, slots=True)
class StoreNode:
    """One life of a node, and where others reach it; `shares`: with other nodes."""

    address: str
    incarnation: int
    shares: bool


class Attachment:
    """A session. Use on the asyncio loop only."""

    def __init__(self, connection: Connection, welcome: Welcome, arena: ArenaMap | None) -> None:
        self.connection = connection
        self.node = StoreNode(welcome.address, welcome.incarnation, welcome.shares)
        self.lease_s = welcome.lease_s
        self.slots: Sequence[Buffer] = () if arena is None else arena.slots  # none without a host tier
        self._arena = arena
        self._last_told = 0
        self._to_release: list[int] = []

    def find(self, keys: Sequence[BlockKey]) -> tuple[list[int], list[int]]:
        """Slots and checksums of the longest leading run of `keys` that the arena's directory lists."""
        return ([], []) if self._arena is None else self._arena.directory.find(keys)

    def hold(self, keys: Sequence[BlockKey]) -> int:
        """Have these leased; the node is told and nobody waits. Returns what to `release`."""
        self._last_told += 1
        lease_id = TOLD | self._last_told
        self.connection.tell(Kind.HOLD, encode_hold(lease_id, keys))
        return lease_id

    def release(self, lease_id: int) -> None:
        """Releases of one turn of the loop go together; a lease that is lost on the way ends by itself."""
        if not self._to_release:
            asyncio.get_running_loop().call_soon(self._send_releases)
        self._to_release.append(lease_id)

    def decoded(self, decode: Callable[[bytes], T], payload: bytes) -> T | None:
        """None, and the session is over, if the node answered what is no answer."""
        try:
            return decode(payload)
        except BadFrame as error:
            self.connection.close(str(error))
            return None

    def _send_releases(self) -> None:
        lease_ids, self._to_release = self._to_release, []
        self.connection.tell(Kind.RELEASE, encode_leases(lease_ids))


class Attaching:
    """Attach, and again whenever the session has ended. Use on the asyncio loop only."""

    def __init__(
        self, path: Path, hello: Hello, writing: Collection[tuple[int, int]], on_arena: OnArena | None
    ) -> None:
        """
        Args:
            writing: looked at whenever a session begins: slot and generation of what its callers still write.
            on_arena: called on a thread with the memory of each arena that is mapped, and with None when that goes.
        """
        self._on_arena = on_arena
        self.changed: Callable[[], None] = lambda: None  # `current` has
        self._attachment: Attachment | None = None
        self._path = path
        self._hello = hello
        self._writing = writing
        self._arena_path = ""
        self._arena: ArenaMap | None = None
        self._populating: asyncio.Task[None] | None = None
        self._first: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._task = asyncio.create_task(self._run(), name=f"store session of {hello.owner}")

    @property
    def current(self) -> Attachment | None:
        """The session, while there is one."""
        attachment = self._attachment
        return None if attachment is None or attachment.connection.ended.done() else attachment

    async def tried(self) -> None:
        """Until the first try has ended. Raises Unavailable if the node refuses."""
        await self._first

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, *filter(None, [self._populating]), return_exceptions=True)

    async def _run(self) -> None:
        attempt = 0
        while True:
            refusal = await self._attach_once()
            if refusal and not self._first.done():
                self._first.set_exception(Unavailable(refusal))
                return
            if not self._first.done():
                log.warning("there is no store at %s yet: every look-up misses until there is", self._path)
                self._first.set_result(None)
            attempt = 0 if refusal is None else attempt + 1
            await asyncio.sleep(_BACKOFF_S[min(attempt, len(_BACKOFF_S) - 1)])

    async def _attach_once(self) -> str | None:
        """One session from its start to its end. Returns why it did not come to be; "" if nobody was there."""
        try:
            connection = await Connection.open(self._path)
        except OSError:
            await self._unmap()
            return ""
        try:
            hello = replace(self._hello, writing=tuple(self._writing))
            answer = await connection.call(Kind.HELLO, hello.encode(), ATTACH_TIMEOUT_S)
            if answer is None:
                if connection.ended.result() != LATE:
                    await self._unmap()
                if connection.refusal:
                    log.warning("the store refuses us: %s", connection.refusal)
                return connection.refusal
            welcome = Welcome.decode(answer)
            self._attachment = Attachment(connection, welcome, self._map(welcome))
            self._hello = replace(self._hello, previous_session=welcome.session_id)
            log.info("attached to the store: %d slots in %s", welcome.num_slots, welcome.arena_path or "no host tier")
            if not self._first.done():
                self._first.set_result(None)
            self.changed()
            reason = await asyncio.shield(connection.ended)
            log.warning("the store node does not answer (%s): every look-up misses until it is back", reason)
            if reason != LATE:
                await self._unmap()
        except (BadFrame, OSError) as error:  # OSError: the arena cannot be mapped
            log.warning("cannot attach to the store: %s", error)
            return ""
        finally:
            self._attachment = None
            self.changed()
            connection.close("this worker leaves")
        return None

    def _map(self, welcome: Welcome) -> ArenaMap | None:
        """The node's arena; the same mapping as before if it is the same life of the node. Raises OSError."""
        if welcome.arena_path != self._arena_path:
            self._arena_path, self._arena = "", None
            if welcome.arena_path:
                self._arena = ArenaMap(Path(welcome.arena_path), welcome.num_slots, self._hello.block_bytes)
                self._arena_path = welcome.arena_path
                self._populating = asyncio.create_task(asyncio.to_thread(self._prepare, self._arena))
        return self._arena

    async def _unmap(self) -> None:
        """What a node that has ended had of shared memory is free once nobody maps it: its next life needs the room."""
        if self._arena is None:
            return
        self._attachment = None
        self._arena_path, self._arena = "", None
        await asyncio.gather(*filter(None, [self._populating]), return_exceptions=True)
        if self._on_arena is not None:
            await asyncio.to_thread(self._on_arena, None)

    def _prepare(self, arena: ArenaMap) -> None:
        arena.populate()
        if self._on_arena is not None:
            self._on_arena(arena.all)
