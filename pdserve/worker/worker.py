"""The worker: hears routers, asks the engine, and tells routers what each step brought. All on the asyncio loop.

                   ┌── PrefillSide ── Push ────┐
RouterSession ──> Worker                       LinkTable ──> peers
                   ├── DecodeSide ── Arrival ──┘
                   └── StoreSide ──────────────> the store node of this machine
                        EngineThread
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable

from prometheus_client import CollectorRegistry

from kvstore.pool import Ledger
from kvstore.store.wire import split_keys
from pdserve.engine.engine import StepToken
from pdserve.grammars import Grammars
from pdserve.protocol import codec
from pdserve.protocol import worker_pb2 as pb
from pdserve.worker.config import WorkerLimits
from pdserve.worker.decode import DecodeSide
from pdserve.worker.engine_thread import Computed, EngineThread, Load, StepReport
from pdserve.worker.links import LinkTable
from pdserve.worker.memory import BlockMemory
from pdserve.worker.metrics import WorkerMetrics
from pdserve.worker.parts import Parts
from pdserve.worker.prefill import PrefillSide
from pdserve.worker.requests import Entry, RequestTable, entry_name
from pdserve.worker.role_change import RoleKeeper
from pdserve.worker.session import RouterSession
from pdserve.worker.shares import Others, Shares
from pdserve.worker.store_side import StoreSide

log = logging.getLogger(__name__)

_LOAD_EVERY_S = 0.1
_SHARE_EVERY_S = 0.01  # what one router sends is told to the others so soon
_LEDGER_TIMEOUT_S = 5.0


class Worker:
    """All of it on the asyncio loop; implements the engine thread's Listener and what the admin port shows."""

    def __init__(
        self,
        hello: pb.WorkerHello,
        engine: EngineThread,
        grammars: Grammars,
        links: LinkTable,
        memory: BlockMemory,
        metrics: WorkerMetrics,
        limits: WorkerLimits,
        store: StoreSide | None = None,
    ) -> None:
        self.worker_id = hello.worker_id
        self.links = links
        self._hello = hello
        self._engine = engine
        self._metrics = metrics
        self._limits = limits
        self._store = store
        self._requests = RequestTable(
            engine,
            grammars,
            block_size=hello.block_size,
            vocab_size=hello.vocab_size,
            max_model_len=hello.max_model_len,
        )
        parts = Parts(self._requests, engine, links, memory, metrics, limits, store)
        self.prefill = PrefillSide(parts)
        self._decode = DecodeSide(parts, hello.worker_id, hello.incarnation)
        self.roles = RoleKeeper(hello.role, self._requests, self._role_changed)
        self.on_role: Callable[[pb.RoleReport], None] = lambda report: None  # heard after the routers
        links.on_report = self._report_link
        if store is not None:
            store.on_node(lambda: self._tell_all(pb.WorkerMessage(store=store.report())))
        self._sessions: dict[RouterSession, list[pb.Peer]] = {}  # with the peers that the router wants linked
        self._load = Load(0, 0, 0, 0, hello.num_blocks, 0)
        self._step_s = 0.0
        self._load_sent_s = 0.0
        self._shares = Shares(self._requests)
        self._share: asyncio.TimerHandle | None = None  # the others are to be told

    @property
    def registry(self) -> CollectorRegistry:
        return self._metrics.registry

    # --- routers -----------------------------------------------------------------------------------------------------

    def open_session(self, session: RouterSession) -> None:
        self._sessions[session] = []
        self._shares.opened(session)
        session.send(pb.WorkerMessage(hello=self._hello))
        for report in self.links.reports():
            session.send(pb.WorkerMessage(link=report))
        session.send(self._load_message(Others()))
        if self._store is not None:
            session.send(pb.WorkerMessage(store=self._store.report()))
        # Events since the last step are in the snapshot too; telling one twice does no harm.
        self._engine.tell(lambda engine, now_s: engine.pool.visible_keys(), session.subscribe)

    def close_session(self, session: RouterSession) -> None:
        """The router is gone: nobody wants its requests any more."""
        del self._sessions[session]
        self._shares.closed(session)
        self._set_peers()
        for entry in self._requests:
            if entry.session is session:
                self._requests.end(entry)

    def handle(self, session: RouterSession, message: pb.RouterMessage) -> None:
        """One message of a router, in order. What is malformed is answered; what comes too late is ignored."""
        match message.WhichOneof("body"):
            case "submit" if self._takes(session, message.submit):
                if self.prefill.submit(session, message.submit):
                    self._shares.sent(session, message.submit.uncached_tokens)
                    self._share_soon()
            case "reserve" if self._takes(session, message.reserve.request):
                self._decode.reserve(session, message.reserve)
            case "submit" | "reserve":
                pass  # turned away
            case "handoff":
                self.prefill.hand_off(message.handoff)
            case "abort":
                entry = self._requests.get(entry_name(message.abort.request_id, message.abort.attempt))
                if entry is not None and entry.session is session:
                    self._requests.end(entry)
            case "prefetch":
                if self._store is not None and self.roles.takes_requests:
                    self._store.prefetch(split_keys(message.prefetch.keys))
            case "peers":
                self._sessions[session] = list(message.peers.peers)
                self._set_peers()
            case "ping":
                # A router that hears nothing sends its requests elsewhere: right, if no step comes to an end here.
                if self.stalled_s(time.monotonic()) < self._limits.stalled_s:
                    session.send(pb.WorkerMessage(pong=pb.Pong(sequence=message.ping.sequence)))
            case other:
                log.warning("router %s sent %s, which has no meaning here", session.router_id, other)

    def _takes(self, session: RouterSession, submit: pb.Submit) -> bool:
        """While its role changes it turns away what routers sent before they heard of it."""
        if not self.roles.takes_requests:
            self._requests.turn_away(session, submit.request_id, submit.attempt, self.roles.why_not)
        return self.roles.takes_requests

    def _report_link(self, report: pb.LinkReport) -> None:
        self._tell_all(pb.WorkerMessage(link=report))

    def _role_changed(self, report: pb.RoleReport) -> None:
        self._hello.role, self._hello.next_role = report.role, report.next_role
        self._tell_all(pb.WorkerMessage(role=report))
        self._metrics.set_role(pb.Role.Name(report.role).lower())
        self.on_role(report)

    def _tell_all(self, message: pb.WorkerMessage) -> None:
        for session in self._sessions:
            session.send(message)

    def _set_peers(self) -> None:
        self.links.set_peers({peer.worker_id: peer for peers in self._sessions.values() for peer in peers}.values())

    # --- the engine --------------------------------------------------------------------------------------------------

    def on_last_chunks(self, computed: list[Computed]) -> None:
        for item in computed:
            self.prefill.last_chunk(item)

    def on_step(self, report: StepReport) -> None:
        """Tokens leave in one message per router; what the step changed is passed on."""
        for token in report.tokens:
            self._send_token(token)
        for sequence in report.failed:
            entry = self._requests.get(sequence.name)
            if entry is not None:
                self._requests.fail(entry, "the worker failed to compute this request")
        for session in self._sessions:
            session.flush()
            session.send_events(report.events)
        if self._store is not None:
            self._store.on_step(report)
        for computed in report.computed:
            # In a later turn of the loop: the first token is written before its blocks are sealed and sent.
            asyncio.get_running_loop().call_soon(self.prefill.computed, computed)
        self._load = report.load
        if report.num_tokens:
            self._step_s = report.step_s
        self._metrics.on_step(report)
        now_s = time.monotonic()
        if now_s - self._load_sent_s >= _LOAD_EVERY_S or not report.load.running_sequences:
            self._tell_load(now_s)
        self._decode.retry()

    def _send_token(self, token: StepToken) -> None:
        sequence = token.sequence
        entry = self._requests.get(sequence.name)
        if entry is None:
            return  # aborted while the step ran
        event = pb.TokenEvent(
            request_id=entry.request_id,
            attempt=entry.attempt,
            index=token.index,
            token_id=token.token_id,
            finish=codec.finish_to_proto(token.finish_reason),
            logprobs=codec.logprobs_to_proto(token.logprobs) if token.logprobs is not None else None,
        )
        if not entry.tokens_sent:
            event.cached_by_tier.update(entry.cached_by_tier())
            event.times.CopyFrom(entry.times or self._compute_times(entry))
            event.prompt_logprobs.extend(map(codec.logprobs_to_proto, sequence.prompt_logprobs))
        entry.tokens_sent += 1
        entry.session.add_token(event)
        # A prompt that is to be handed over stays until it is pushed; one whose first token is its last is not pushed.
        if token.finish_reason is not None:
            self._requests.end(entry)

    @staticmethod
    def _compute_times(entry: Entry) -> pb.StageTimes:
        now_s = time.monotonic()
        scheduled_s = entry.sequence.scheduled_s
        scheduled_s = scheduled_s if scheduled_s is not None else now_s
        return pb.StageTimes(
            fetch_s=entry.fetch_s,
            queue_s=scheduled_s - entry.received_s - entry.fetch_s,
            compute_s=now_s - scheduled_s,
        )

    def _share_soon(self) -> None:
        """A router that chooses next is to know what another has just sent, whatever the step in progress takes."""
        if self._share is None and self._shares.several:
            loop = asyncio.get_running_loop()
            self._share = loop.call_later(_SHARE_EVERY_S, lambda: self._tell_load(time.monotonic()))

    def _tell_load(self, now_s: float) -> None:
        self._load_sent_s = now_s
        if self._share is not None:
            self._share.cancel()
            self._share = None
        for session, others in self._shares.others().items():
            session.send(self._load_message(others))

    def _load_message(self, others: Others) -> pb.WorkerMessage:
        load = self._load
        return pb.WorkerMessage(
            load=pb.LoadReport(
                waiting_sequences=load.waiting_sequences,
                running_sequences=load.running_sequences,
                waiting_tokens=load.waiting_tokens,
                free_blocks=load.available_blocks,
                total_blocks=self._hello.num_blocks,
                step_s=self._step_s,
                pending_reservations=self._decode.num_pending,
                context_tokens=load.context_tokens,
                others_sent_tokens=others.sent_tokens,
                others_waiting_tokens=others.waiting_tokens,
                others_sequences=others.sequences,
            )
        )

    # --- health ------------------------------------------------------------------------------------------------------

    def stalled_s(self, now_s: float) -> float:
        """How long the step in progress has been running."""
        return self._engine.stalled_s(now_s)

    async def ledger(self) -> Ledger:
        """Raises TimeoutError if the engine is busy for too long."""
        async with asyncio.timeout(_LEDGER_TIMEOUT_S):
            return await self._ask_ledger()

    def _ask_ledger(self) -> asyncio.Future[Ledger]:
        return self._engine.ask(lambda engine, now_s: engine.pool.ledger(now_s))

    async def watch(self) -> None:
        """Deadlines and health on their own clock, not on the arrival of work. Ends the process if the engine hangs."""
        gauges = self._ask_ledger()
        while not self._engine.died.is_set():
            await asyncio.sleep(self._limits.tick_s)
            now_s = time.monotonic()
            for entry in self._requests:
                if entry.deadline_s <= now_s:
                    self._requests.fail(entry, "the request's deadline has passed")
            self.prefill.expire(now_s)
            self._decode.expire(now_s)
            stalled_s = self.stalled_s(now_s)
            if stalled_s > self._limits.exit_s:
                log.critical("a step has taken %.0f s: ending, so that the requests move elsewhere", stalled_s)
                os._exit(70)
            if gauges.done():  # a long step makes the gauges old, and holds up no deadline
                self._metrics.on_ledger(gauges.result())
                gauges = self._ask_ledger()
