"""The node's end of the workers' Unix socket: one connection is one session of a worker.

    OPENED ── HELLO ──> OPENING ── WELCOME ──> ATTACHED ── it hangs up, or sends what is no frame of ours ──> ENDED
                           └── another model or layout: REFUSAL ─────────────────────────────────────────────^

All of it runs on the node's loop, and a call that need not wait is answered where its bytes arrive: a hand-over to
another thread or task costs more than the call. What must wait (disk, other nodes) is a task; calls behind it go on.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any, cast

from kvstore.errors import Unavailable
from kvstore.keys import BlockKey
from kvstore.store.frames import BadFrame, Frame, FrameReader, Kind, encode_frame
from kvstore.store.geometry import Geometry
from kvstore.store.host_block import SlotRef
from kvstore.store.loads import Loaded, Loading
from kvstore.store.messages import (
    TOLD,
    Hello,
    LoadReply,
    Welcome,
    decode_begin,
    decode_commit,
    decode_hold,
    decode_keys,
    decode_leases,
    decode_load,
    decode_refs,
    encode_count,
    encode_refs,
)
from kvstore.store.opened import NodeState, OpenStore
from kvstore.store.sessions import Session
from kvstore.store.store import TieredStore
from kvstore.store.unix_socket import bind, peer_pid

log = logging.getLogger(__name__)

MAX_TOLD = 4096  # leases that one worker has numbered itself; the node takes no more of them
MAX_WAITING = 64  # calls of one worker that wait; beyond it nothing more is read from it
_BACKLOG = 128


class WorkerServer:
    """Listens from `start` to `close`. Use on the node's loop."""

    def __init__(self, state: NodeState, path: Path) -> None:
        """Take the socket. Raises Unavailable if somebody listens there already, or nobody may."""
        self._state = state
        self._listening = bind(path)
        self._server: asyncio.Server | None = None
        self._connections: set[WorkerConnection] = set()

    async def start(self) -> None:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_unix_server(
            lambda: WorkerConnection(self._state, self._connections), sock=self._listening, backlog=_BACKLOG
        )

    def close(self) -> None:
        """End all sessions. Idempotent."""
        (self._listening if self._server is None else self._server).close()
        for connection in tuple(self._connections):
            connection.close()


class WorkerConnection(asyncio.Protocol):
    """One worker's session. Holds at most what one read brings, `MAX_WAITING` tasks, and unread replies of one read."""

    def __init__(self, state: NodeState, connections: set[WorkerConnection]) -> None:
        self._state = state
        self._connections = connections
        self._reader = FrameReader()
        self._frames: deque[Frame] = deque()
        self._tasks: set[asyncio.Task[None]] = set()
        self._transport: asyncio.Transport
        self._store: TieredStore
        self._opened: OpenStore | None = None
        self._session: Session | None = None
        self._owner = ""
        self._told: dict[int, int] = {}  # the node's lease by the worker's own number
        self._choked = False  # the worker does not read what we write
        self._reading = True
        self._greeted = False
        self._ended = False

    # --- called by the loop ------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's does not derive from it
        self._connections.add(self)

    def data_received(self, data: bytes) -> None:
        if self._ended:
            return
        try:
            self._frames += self._reader.feed(data)
        except BadFrame as error:
            self._refuse(str(error))
            return
        self._go_on()

    def pause_writing(self) -> None:
        self._choked = True

    def resume_writing(self) -> None:
        self._choked = False
        self._go_on()

    def connection_lost(self, error: Exception | None) -> None:
        self._end()

    # --- frames ------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        self._end()
        self._transport.close()

    def _end(self) -> None:
        """The worker's leases end, its slots wait for what its process does. Idempotent."""
        if self._ended:
            return
        self._ended = True
        self._connections.discard(self)
        self._frames.clear()
        for task in self._tasks:
            task.cancel()
        if self._opened is not None and self._session is not None:
            self._opened.sessions.lost(self._session)

    def _refuse(self, reason: str) -> None:
        if not self._ended:
            log.warning("refused %s: %s", self._owner or "a worker", reason)
            self._transport.write(encode_frame(Kind.REFUSAL, 0, reason.encode()))
            self.close()

    @property
    def _must_wait(self) -> bool:
        return self._choked or len(self._tasks) >= MAX_WAITING

    def _go_on(self) -> None:
        """Answer frames, as long as we may; more is read only once all have their turn."""
        frames = self._frames
        while frames and not self._must_wait:
            frame = frames.popleft()
            try:
                self._answer(frame)
            except BadFrame as error:
                self._refuse(str(error))
        if self._reading is self._must_wait and not self._ended:
            self._reading = not self._reading
            (self._transport.resume_reading if self._reading else self._transport.pause_reading)()

    def _answer(self, frame: Frame) -> None:
        """Raises BadFrame."""
        kind, call, payload = frame
        if kind == Kind.HELLO and not self._greeted:
            self._greeted = True
            self._start(self._open(call, Hello.decode(payload)))
            return
        if self._session is None:
            raise BadFrame("a worker says HELLO, once, and waits for the answer")
        match kind:
            case Kind.LOAD:
                self._load(call, payload)
            case Kind.RELEASE:
                for lease_id in decode_leases(payload):
                    self._store.release(self._told.pop(lease_id, 0) if lease_id & TOLD else lease_id)
            case Kind.HOLD:
                self._hold(*decode_hold(payload))
            case Kind.BEGIN_SAVE:
                entries, tenant = decode_begin(payload)
                refs = self._store.begin_save(self._owner, entries, tenant)
                pairs = [None if ref is None else (ref.slot, ref.generation) for ref in refs]
                self._reply(call, encode_refs(pairs))
            case Kind.COMMIT_SAVE:
                self._store.commit_save([(SlotRef(*ref), checksum) for ref, checksum in decode_commit(payload)])
                self._reply(call)
            case Kind.ABANDON_SAVE:
                self._store.abandon_save([SlotRef(*ref) for ref in decode_refs(payload)])
                self._reply(call)
            case Kind.LOOKUP:
                self._lookup(call, payload)
            case Kind.REPORT_CORRUPT:
                self._start(self._report(call, decode_keys(payload)))
            case _:
                raise BadFrame(f"there is no message of kind {kind}, or not after HELLO")

    def _reply(self, call: int, payload: bytes = b"") -> None:
        if call and not self._ended:
            self._transport.write(encode_frame(Kind.REPLY, call, payload))

    def _start(self, what: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(what)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a call of %s failed", self._owner, exc_info=error)
            self._refuse("the store node made a mistake; its log says which")
        self._go_on()

    # --- calls -------------------------------------------------------------------------------------------------------

    async def _open(self, call: int, hello: Hello) -> None:
        """The process is the one that the kernel saw connecting: its end frees what it holds."""
        pid = peer_pid(self._transport)
        try:
            opened = await self._state.open(Geometry(hello.fingerprint, hello.block_bytes))
            writing = {SlotRef(*ref) for ref in hello.writing}
            opened.sessions.resume(hello.previous_session, pid, writing)
            session = opened.sessions.open(hello.owner, pid)
        except (ValueError, Unavailable) as error:
            self._refuse(str(error))
            return
        self._opened, self._session, self._store, self._owner = opened, session, opened.store, session.owner
        welcome = Welcome(
            session.session_id,
            self._state.incarnation,
            opened.store.limits.lease_s,
            opened.store.host.num_slots,
            opened.arena_path,
            self._state.address,
            opened.peers is not None,
        )
        self._reply(call, welcome.encode())

    def _lookup(self, call: int, payload: bytes) -> None:
        keys = decode_keys(payload)
        tiers = self._store.lookup_here(keys)
        if len(tiers) == len(keys) or self._store.remote is None:
            self._reply(call, tiers)
        else:
            self._start(self._lookup_elsewhere(call, keys))

    async def _lookup_elsewhere(self, call: int, keys: Sequence[BlockKey]) -> None:
        self._reply(call, await self._store.lookup(keys))

    def _load(self, call: int, payload: bytes) -> None:
        deadline_s, keys = decode_load(payload)
        loading = self._store.begin_load(self._owner, keys, deadline_s)
        if self._store.has_more(loading):
            self._start(self._load_rest(call, loading))
        else:
            self._give(call, self._store.end_load(loading))

    async def _load_rest(self, call: int, loading: Loading) -> None:
        await self._store.bring_rest(loading)
        self._give(call, self._store.end_load(loading))

    def _hold(self, number: int, keys: Sequence[BlockKey]) -> None:
        """The worker reads these already."""
        if len(self._told) < MAX_TOLD:
            loaded = self._store.end_load(self._store.begin_load(self._owner, keys, 0.0))
            if loaded.lease_id:
                self._told[number] = loaded.lease_id

    def _give(self, call: int, loaded: Loaded) -> None:
        blocks = loaded.blocks
        reply = LoadReply(
            loaded.lease_id, [block.ref.slot for block in blocks], [block.checksum for block in blocks], loaded.tiers
        )
        self._reply(call, reply.encode())

    async def _report(self, call: int, keys: Sequence[BlockKey]) -> None:
        self._reply(call, encode_count(await self._store.report_corrupt(keys)))
