"""The decode side of a worker: room for a sequence, its missing blocks received and verified, and off it runs."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from dataclasses import dataclass

from kvstore.errors import NoRoom
from kvstore.keys import content_key
from kvstore.pool import BlockRef
from kvstore.transfer.manifest import Subject
from pdserve.engine.engine import Engine
from pdserve.protocol import worker_pb2 as pb
from pdserve.worker.arrival import Arrival
from pdserve.worker.links import PeerLink
from pdserve.worker.parts import Parts
from pdserve.worker.requests import Entry
from pdserve.worker.session import RouterSession


@dataclass(frozen=True, slots=True)
class Pending:
    """A reservation that waits for room, oldest first."""

    entry: Entry
    reserve: pb.Reserve
    expires_s: float


class _Turn:
    """One pass over the reservations, in order. Once one finds no room, those behind it do not overtake it.

    Written by the engine's thread, read by both.
    """

    full = False


class DecodeSide:
    """Use on the asyncio loop only.

    Reserve ──> room? (waits a little) ──> receives posted, ticket ──> blocks verified ──> the sequence runs
    """

    def __init__(self, parts: Parts, worker_id: str, incarnation: int) -> None:
        self._parts = parts
        self._worker_id = worker_id
        self._incarnation = incarnation
        self._pending: OrderedDict[str, Pending] = OrderedDict()
        self._arrivals: dict[Arrival, Entry] = {}
        self._turn = _Turn()
        self._num_asked = 0  # questions on their way to the engine
        self._next_ticket = 1  # 0 is the probe's

    @property
    def num_pending(self) -> int:
        return len(self._pending)

    def reserve(self, session: RouterSession, reserve: pb.Reserve) -> None:
        """Answered with Reserved or Refused, at the latest after `reservation_s`."""
        entry = self._parts.requests.open(session, reserve.request, prefill_only=False)
        if entry is None:
            return
        if len(self._pending) >= self._parts.limits.reservations:
            self._parts.requests.refuse(entry, f"{len(self._pending)} reservations are waiting for room")
            return
        pending = self._pending[entry.name] = Pending(
            entry, reserve, time.monotonic() + self._parts.limits.reservation_s
        )
        if not self._turn.full:
            self._ask(pending)

    def retry(self) -> None:
        """Room may have appeared: ask for all that wait, oldest first. The engine answers all between two steps."""
        if self._turn.full and not self._num_asked:
            self._turn = _Turn()
            for pending in list(self._pending.values()):
                self._ask(pending)

    def expire(self, now_s: float) -> None:
        """Refuse reservations that have waited too long; fail arrivals whose blocks did not come."""
        for pending in [p for p in self._pending.values() if p.expires_s <= now_s]:
            del self._pending[pending.entry.name]
            self._parts.requests.refuse(pending.entry, "no room for the sequence in time")
        for arrival in [arrival for arrival in self._arrivals if arrival.deadline_s <= now_s]:
            arrival.stop("its blocks did not arrive in time")

    # --- inside ------------------------------------------------------------------------------------------------------

    def _ask(self, pending: Pending) -> None:
        entry = pending.entry
        if self._parts.requests.get(entry.name) is not entry:
            self._forget(pending)
            return
        peer = self._parts.links.get(pending.reserve.prefill_worker_id, pending.reserve.prefill_incarnation)
        if peer is None:
            self._forget(pending)
            self._parts.requests.refuse(entry, f"no link to {pending.reserve.prefill_worker_id}")
            return
        sequence, turn = entry.sequence, self._turn
        deadline_s = min(entry.deadline_s, time.monotonic() + self._parts.limits.arrival_s)

        def reserve(engine: Engine, now_s: float) -> int:
            if turn.full:
                raise NoRoom("others wait for room")
            try:
                held = engine.scheduler.reserve(sequence, now_s, deadline_s)
            except NoRoom:
                turn.full = True
                raise
            engine.pool.receive(sequence.blocks[held:])
            return held

        def answered(answer: asyncio.Future[int]) -> None:
            self._num_asked -= 1
            error = answer.exception()
            if isinstance(error, NoRoom):
                return  # waits on; asked again when something has changed
            self._forget(pending)
            if error is not None:
                self._parts.requests.fail(entry, f"reserving failed: {error}")
            else:
                self._reserved(entry, peer, answer.result(), deadline_s)

        self._num_asked += 1
        self._parts.engine.ask(reserve).add_done_callback(answered)

    def _forget(self, pending: Pending) -> None:
        if self._pending.get(pending.entry.name) is pending:
            del self._pending[pending.entry.name]

    def _reserved(self, entry: Entry, peer: PeerLink, held: int, deadline_s: float) -> None:
        missing = entry.sequence.blocks[held:]
        if self._parts.requests.get(entry.name) is not entry:
            self.drained(missing)  # it ended meanwhile, and nothing was posted into its blocks
            return
        now_s = time.monotonic()
        ticket = pb.Ticket(
            ticket_id=self._next_ticket,
            decode_worker_id=self._worker_id,
            decode_incarnation=self._incarnation,
            first_ordinal=held,
            block_ids=[ref.block_id for ref in missing],
            generations=[ref.generation for ref in missing],
            remaining_s=deadline_s - now_s,
        )
        self._next_ticket += 1
        subject = Subject(
            ticket.ticket_id,
            content_key(entry.sequence.root_key, entry.sequence.token_ids),
            num_tokens=entry.sequence.num_output_tokens + 1,
            vocab_size=self._parts.requests.vocab_size,
        )
        arrival = entry.arrival = Arrival(
            ticket,
            subject,
            missing,
            peer=peer,
            links=self._parts.links,
            memory=self._parts.memory,
            listener=self,
            deadline_s=deadline_s,
            fence_s=self._parts.limits.fence_s,
        )
        self._arrivals[arrival] = entry
        entry.times = pb.StageTimes(reserve_s=now_s - entry.received_s)
        reserved = pb.Reserved(request_id=entry.request_id, attempt=entry.attempt, ticket=ticket)
        entry.session.send(pb.WorkerMessage(reserved=reserved))
        arrival.start()

    # --- the arrivals' listener --------------------------------------------------------------------------------------

    def committed(self, arrival: Arrival, output_token_ids: tuple[int, ...]) -> None:
        """The sequence runs from the next step on: all blocks are its own, and exactly one token is new."""
        entry = self._arrivals.pop(arrival)
        entry.arrival = None
        sequence = entry.sequence
        new_tokens = output_token_ids[sequence.num_output_tokens :]

        def admit(engine: Engine, now_s: float) -> None:
            for ref in arrival.blocks:
                engine.pool.land(ref)
            engine.scheduler.arrived(sequence, new_tokens)

        self._parts.engine.post(admit)
        assert entry.times is not None
        entry.times.transfer_s, entry.times.commit_s = arrival.transfer_s, arrival.verify_s
        self._parts.metrics.on_received(arrival.transfer_s, len(arrival.blocks) * self._parts.memory.block_bytes)

    def failed(self, arrival: Arrival, reason: str) -> None:
        """Ends the request first, which puts the blocks into quarantine; they are drained after that."""
        entry = self._arrivals.pop(arrival)
        if self._parts.requests.get(entry.name) is entry:
            self._parts.metrics.transfer_failures.labels("receive").inc()
            self._parts.requests.fail(entry, reason)

    def landed_late(self) -> None:
        self._parts.metrics.late_landings.inc()

    def drained(self, refs: list[BlockRef]) -> None:
        """Nothing lands in these quarantined blocks any more."""

        def drained(engine: Engine, now_s: float) -> None:
            for ref in refs:
                engine.pool.drained(ref)

        self._parts.engine.post(drained)
