"""The prefill side of a worker: computes prompts and pushes their blocks to the decode worker that a ticket names."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict

from kvstore.errors import TransferError
from kvstore.keys import content_key
from pdserve.engine.engine import Engine
from pdserve.protocol import worker_pb2 as pb
from pdserve.worker.engine_thread import Computed
from pdserve.worker.parts import Parts
from pdserve.worker.push import Push, TicketId
from pdserve.worker.requests import Entry, entry_name
from pdserve.worker.session import RouterSession
from pdserve.worker.store_side import StoreSide


class PrefillSide:
    """Use on the asyncio loop only.

    A prompt is submitted ──> its last chunk is scheduled (HandoffWanted) ──> Handoff with a ticket ──> pushed ──> end.
    The ticket may come while the last chunk is still computed: blocks before it leave at once, the others when ready.
    """

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        # Tickets under which nothing is sent any more, with the ordinals that were.
        self._closed: OrderedDict[TicketId, tuple[int, ...]] = OrderedDict()
        self._pushes: dict[TicketId, Push] = {}

    def submit(self, session: RouterSession, submit: pb.Submit) -> bool:
        """Queue a prompt, or a whole request if it is not `disaggregated`. False: it cannot be run, or is here."""
        entry = self._parts.requests.open(session, submit, prefill_only=submit.disaggregated)
        if entry is None:
            return False
        entry.uncached_tokens = submit.uncached_tokens
        if self._parts.store is None or entry.sequence.tells_prompt_logprobs:
            self._queue(entry)
        else:
            self._parts.store.start(self._load_and_queue(entry, self._parts.store))
        return True

    async def _load_and_queue(self, entry: Entry, store: StoreSide) -> None:
        """Blocks that the store has and the pool lacks come first, if that is faster than to compute them."""
        sequence = entry.sequence
        # The last token is always computed: its logits are what the next one is sampled from.
        keys = sequence.full_block_keys()[: (len(sequence) - 1) // sequence.block_size]
        entry.fetched = await store.load(f"{entry.name} load", keys)
        entry.fetch_s = time.monotonic() - entry.received_s
        if self._parts.requests.get(entry.name) is entry:  # else it ended meanwhile
            self._queue(entry)

    def _queue(self, entry: Entry) -> None:
        def add(engine: Engine, now_s: float) -> bool:
            if engine.scheduler.full:
                return False
            engine.scheduler.add(entry.sequence)
            return True

        def added(answer: asyncio.Future[bool]) -> None:
            if not answer.result():
                self._parts.requests.refuse(entry, "the queue of this worker is full")

        self._parts.engine.ask(add).add_done_callback(added)

    def last_chunk(self, computed: Computed) -> None:
        """The blocks before the last chunk are ready; it is time to choose a decode worker."""
        entry = self._parts.requests.get(computed.sequence.name)
        if entry is None or entry.push is not None:
            return
        entry.push = Push(
            self._parts.links, self._parts.memory, self._parts.limits, lambda error: self._over(entry, error)
        )
        entry.push.ready(computed.block_ids)
        wanted = pb.HandoffWanted(request_id=entry.request_id, attempt=entry.attempt)
        entry.session.send(pb.WorkerMessage(handoff_wanted=wanted))

    def computed(self, computed: Computed) -> None:
        """All blocks are ready, and the first token is sampled."""
        entry = self._parts.requests.get(computed.sequence.name)
        if entry is not None and entry.push is not None:
            sequence = computed.sequence
            entry.push.ready(computed.block_ids)
            # The newest token's KV is decode's to compute.
            content = content_key(sequence.root_key, sequence.token_ids[:-1])
            entry.push.complete(content, tuple(sequence.token_ids[sequence.num_prompt_tokens :]))

    def hand_off(self, handoff: pb.Handoff) -> None:
        """Push under this ticket. A request that is over needs nothing: decode fences the ticket when its own ends."""
        entry = self._parts.requests.get(entry_name(handoff.request_id, handoff.attempt))
        ticket = handoff.ticket
        ticket_id = TicketId(ticket.decode_worker_id, ticket.decode_incarnation, ticket.ticket_id)
        if entry is None or entry.push is None or ticket_id in self._closed:
            return
        peer = self._parts.links.get(ticket.decode_worker_id, ticket.decode_incarnation)
        if peer is None:
            self._failed(entry, f"no link to {ticket.decode_worker_id}")
            return
        try:
            entry.push.start(ticket, peer)
        except TransferError as error:
            self._failed(entry, str(error))
        else:
            entry.ticket_id = ticket_id
            self._pushes[ticket_id] = entry.push

    def _over(self, entry: Entry, error: str | None) -> None:
        """Nothing reads the blocks any more."""
        assert entry.push is not None
        assert entry.ticket_id is not None
        del self._pushes[entry.ticket_id]
        self._close(entry.ticket_id, entry.push.sent())
        self._parts.metrics.transfer_bytes.labels("sent").inc(entry.push.num_bytes)
        if error is None:
            self._parts.requests.end(entry)
        else:
            self._failed(entry, error)

    def _failed(self, entry: Entry, error: str, reason: str = "push") -> None:
        if self._parts.requests.get(entry.name) is entry:
            self._parts.metrics.transfer_failures.labels(reason).inc()
            self._parts.requests.fail(entry, error)

    def expire(self, now_s: float) -> None:
        """Fail prompts whose blocks nobody has taken in time."""
        for entry in self._parts.requests:
            if entry.push is not None and entry.push.overdue(now_s):
                self._failed(entry, "its blocks were not pushed in time", "expired")

    async def fence(self, request: pb.FenceRequest) -> pb.FenceReply:
        """Nothing is sent under this ticket once this has returned; the reply lists what was."""
        ticket_id = TicketId(request.decode_worker_id, request.decode_incarnation, request.ticket_id)
        push = self._pushes.get(ticket_id)
        if push is not None:
            return await push.fence()
        self._close(ticket_id, self._closed.get(ticket_id, ()))
        return pb.FenceReply(sent_ordinals=self._closed[ticket_id])

    def _close(self, ticket_id: TicketId, sent: tuple[int, ...]) -> None:
        self._closed[ticket_id] = sent
        if len(self._closed) > self._parts.limits.closed_tickets:
            self._closed.popitem(last=False)
