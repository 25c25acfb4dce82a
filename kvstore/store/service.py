"""The gRPC edge of a node towards its workers: messages to calls of the store. What a peer sends is checked."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc
import grpc.aio

from kvstore.errors import Unavailable
from kvstore.keys import BlockKey
from kvstore.store import store_pb2 as pb
from kvstore.store.geometry import Geometry
from kvstore.store.host_tier import SlotRef
from kvstore.store.opened import NodeState, OpenStore
from kvstore.store.store_pb2_grpc import StoreServicer
from kvstore.store.wire import split_keys, split_parents

Context = grpc.aio.ServicerContext[Any, Any]
_DONE = pb.Done()
_MAX_OWNER = 128


async def keys_of(data: bytes, context: Context) -> list[BlockKey]:
    try:
        return split_keys(data)
    except ValueError as error:
        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        raise


async def opened_store(state: NodeState, context: Context) -> OpenStore:
    """Ends the call if no worker has attached yet."""
    if state.opened is None:
        await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "no worker has attached yet")
    assert state.opened is not None
    return state.opened


class StoreService(StoreServicer):
    def __init__(self, state: NodeState) -> None:
        self._state = state

    async def Attach(self, request: pb.AttachRequest, context: Context) -> AsyncIterator[pb.Attached]:
        try:
            geometry = Geometry(request.fingerprint, request.block_bytes)
            opened = await self._state.open(geometry)
            writing = await self._refs(request.writing_slots, request.writing_generations, context)
            opened.sessions.resume(request.previous_session_id, request.pid, set(writing))
            session = opened.sessions.open(request.owner[:_MAX_OWNER], request.pid)
        except (ValueError, Unavailable) as error:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
            raise
        try:
            yield pb.Attached(
                session_id=session.session_id,
                incarnation=self._state.incarnation,
                arena_path=opened.arena_path,
                num_slots=opened.store.host.num_slots,
                lease_s=opened.store.limits.lease_s,
            )
            await self._state.ending.wait()
        finally:
            opened.sessions.lost(session)

    async def Lookup(self, request: pb.LookupRequest, context: Context) -> pb.LookupReply:
        opened = await opened_store(self._state, context)
        return pb.LookupReply(tiers=await opened.store.lookup(await keys_of(request.keys, context)))

    async def Load(self, request: pb.LoadRequest, context: Context) -> pb.LoadReply:
        opened, owner = await self._session(request.session_id, context)
        loaded = await opened.store.load(owner, await keys_of(request.keys, context), request.deadline_s)
        if context.cancelled() or opened.sessions.owner(request.session_id) is None:
            opened.store.release(loaded.lease_id)  # nobody is left to release it
        return pb.LoadReply(
            lease_id=loaded.lease_id,
            slots=[block.ref.slot for block in loaded.blocks],
            checksums=[block.checksum for block in loaded.blocks],
            tiers=loaded.tiers,
        )

    async def Release(self, request: pb.ReleaseRequest, context: Context) -> pb.Done:
        opened = await opened_store(self._state, context)
        for lease_id in request.lease_ids:
            opened.store.release(lease_id)
        return _DONE

    async def BeginSave(self, request: pb.BeginSaveRequest, context: Context) -> pb.BeginSaveReply:
        opened, owner = await self._session(request.session_id, context)
        keys = await keys_of(request.keys, context)
        parents: list[BlockKey | None] = []
        with contextlib.suppress(ValueError):
            parents = split_parents(request.parents)
        if len(parents) != len(keys):
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "each key needs a parent")
        refs = opened.store.begin_save(owner, list(zip(keys, parents, strict=True)), request.tenant)
        return pb.BeginSaveReply(
            slots=[-1 if ref is None else ref.slot for ref in refs],
            generations=[0 if ref is None else ref.generation for ref in refs],
        )

    async def CommitSave(self, request: pb.CommitSaveRequest, context: Context) -> pb.Done:
        opened = await opened_store(self._state, context)
        refs = await self._refs(request.slots, request.generations, context)
        if len(refs) != len(request.checksums):
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "each slot needs a checksum")
        opened.store.commit_save(list(zip(refs, request.checksums, strict=True)))
        return _DONE

    async def AbandonSave(self, request: pb.AbandonSaveRequest, context: Context) -> pb.Done:
        opened = await opened_store(self._state, context)
        opened.store.abandon_save(await self._refs(request.slots, request.generations, context))
        return _DONE

    async def ReportCorrupt(self, request: pb.ReportCorruptRequest, context: Context) -> pb.Done:
        opened = await opened_store(self._state, context)
        await opened.store.report_corrupt(await keys_of(request.keys, context))
        return _DONE

    async def _session(self, session_id: int, context: Context) -> tuple[OpenStore, str]:
        opened = await opened_store(self._state, context)
        owner = opened.sessions.owner(session_id)
        if owner is None:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "this session has ended")
        assert owner is not None
        return opened, owner

    async def _refs(self, slots: Sequence[int], generations: Sequence[int], context: Context) -> list[SlotRef]:
        if len(slots) != len(generations):
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "each slot needs a generation")
        return [SlotRef(slot, generation) for slot, generation in zip(slots, generations, strict=True)]
