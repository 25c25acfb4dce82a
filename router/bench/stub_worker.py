"""A worker without an engine: the real protocol over real gRPC, tokens from a pure function, hand-overs in the process.

The next token is a hash of the seed and all tokens before it, so a token lost, doubled or taken from elsewhere changes
everything after it. `oracle_tokens` says what a request must yield, whatever happens to it on the way.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

import grpc
import uvloop

from kvstore.keys import BlockKey, block_keys
from pdserve.protocol import PROTOCOL_VERSION
from pdserve.protocol import worker_pb2 as pb
from pdserve.protocol.worker_pb2_grpc import WorkerServicer, add_WorkerServicer_to_server

VOCAB_SIZE = 49_152  # that of the default model
FINGERPRINT = b"stub"

_STEP_S = 0.0005  # of the stub that benchmarks start; an engine's takes ten times as long or more

TicketId = tuple[str, int, int]


def oracle_tokens(prompt_token_ids: Sequence[int], sampling: pb.Sampling, count: int, *, start: int = 0) -> list[int]:
    """Output tokens `start` to `start + count` of a request that nothing disturbs, shorter if it ends before."""
    state = blake2b(sampling.seed.to_bytes(8, "little"), digest_size=8)
    for token in prompt_token_ids:
        state.update(token.to_bytes(4, "little"))
    output: list[int] = []
    while len(output) < min(start + count, sampling.max_tokens):
        token = int.from_bytes(state.digest(), "little") % VOCAB_SIZE
        state.update(token.to_bytes(4, "little"))
        output.append(token)
        if token in sampling.stop_token_ids:
            break
    return output[start:]


def finish_after(index: int, token: int, sampling: pb.Sampling) -> pb.Finish:
    if token in sampling.stop_token_ids:
        return pb.STOP
    return pb.LENGTH if index + 1 >= sampling.max_tokens else pb.RUNNING


@dataclass(frozen=True, slots=True)
class StubSpec:
    worker_id: str
    role: pb.Role
    token_s: float = 0.0  # between two tokens of a request; all requests get theirs together, as in an engine's step
    prefill_s: float = 0.0
    num_blocks: int = 4096
    block_size: int = 16
    incarnation: int = 1
    model: str = "stub"
    fingerprint: bytes = FINGERPRINT
    has_store: bool = False


@dataclass(slots=True)
class Fabric:
    """In place of the data plane: what prefill pushes under a ticket, decode receives."""

    arrivals: dict[TicketId, asyncio.Future[list[int]]] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class StubSession:
    outbox: asyncio.Queue[pb.WorkerMessage] = field(default_factory=asyncio.Queue)
    tasks: dict[tuple[str, int], asyncio.Task[None]] = field(default_factory=dict)  # by request and attempt
    handoffs: dict[tuple[str, int], asyncio.Future[pb.Ticket]] = field(default_factory=dict)
    next_event: int = 0

    def send(self, **body: Any) -> None:
        self.outbox.put_nowait(pb.WorkerMessage(**body))

    def send_events(self, stored: Sequence[BlockKey], *, snapshot: bool = False) -> None:
        self.send(kv_events=pb.KvEvents(sequence=self.next_event, snapshot=snapshot, stored=b"".join(stored)))
        self.next_event += 1


class StubWorker(WorkerServicer):
    """Runs in this event loop. `at`, `emit` and `next_message` are where a subclass can put faults."""

    def __init__(self, spec: StubSpec, fabric: Fabric) -> None:
        self.spec = spec
        self.address = ""
        self.role = spec.role
        self.next_role = pb.ROLE_UNSPECIFIED
        self.prefetches: list[pb.Prefetch] = []
        self.submits: list[pb.Submit] = []
        self.reserves: list[pb.Reserve] = []
        self.aborts: list[tuple[str, int]] = []
        self.sessions: set[StubSession] = set()
        self._fabric = fabric
        self._held: dict[BlockKey, None] = {}
        self._next_ticket = 1
        self._server: grpc.aio.Server | None = None

    async def start(self, address: str = "127.0.0.1:0") -> str:
        self._server = grpc.aio.server(options=[("grpc.http2.min_ping_interval_without_data_ms", 500)])
        add_WorkerServicer_to_server(self, self._server)
        port = self._server.add_insecure_port(address)
        await self._server.start()
        self.address = f"127.0.0.1:{port}"
        return self.address

    async def stop(self) -> None:
        """As a killed process: all streams break at once."""
        if self._server is not None:
            await self._server.stop(None)

    async def at(self, phase: str, session: StubSession, submit: pb.Submit) -> None:
        """A request reaches `phase`: submit, handoff_wanted, first_token, handoff, reserve, commit or decode."""

    async def next_message(self, session: StubSession) -> pb.WorkerMessage:
        return await session.outbox.get()

    def emit(self, session: StubSession, event: pb.TokenEvent) -> None:
        session.send(step=pb.StepOutput(tokens=[event]))

    # --- the protocol ---

    async def ChangeRole(self, request: pb.ChangeRoleRequest, context: Any) -> pb.RoleReport:
        if request.drain_s < 0.0:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "drain_s is negative")
        if self.next_role not in (pb.ROLE_UNSPECIFIED, request.role):
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "it changes to another role")
        if self.next_role == pb.ROLE_UNSPECIFIED and request.role != self.role:
            self.next_role = request.role
            self._tell_role()
            self._draining = asyncio.create_task(self._drain(request.drain_s))
        return pb.RoleReport(role=self.role, next_role=self.next_role)

    async def _drain(self, drain_s: float) -> None:
        """What is left after `drain_s` is refused."""
        until_s = asyncio.get_running_loop().time() + drain_s
        while any(session.tasks for session in self.sessions):
            if asyncio.get_running_loop().time() >= until_s:
                for session in self.sessions:
                    for (request_id, attempt), task in session.tasks.items():
                        session.send(refused=pb.Refused(request_id=request_id, attempt=attempt, reason="it drains"))
                        task.cancel()
            await asyncio.sleep(0.01)
        self.role, self.next_role = self.next_role, pb.ROLE_UNSPECIFIED
        self._tell_role()

    def _tell_role(self) -> None:
        for session in self.sessions:
            session.send(role=pb.RoleReport(role=self.role, next_role=self.next_role))

    async def Session(
        self, request_iterator: AsyncIterator[pb.RouterMessage], context: Any
    ) -> AsyncIterator[pb.WorkerMessage]:
        session = StubSession()
        self.sessions.add(session)
        session.send(hello=self._hello())
        session.send_events(list(self._held), snapshot=True)
        self._send_load(session)
        reader = asyncio.create_task(self._read(session, request_iterator))
        try:
            while True:
                message = await self.next_message(session)
                if message.HasField("step"):
                    await asyncio.sleep(0)  # so that the step is one of all requests that run
                yield self._merged(session, message)
        finally:
            self.sessions.discard(session)
            tasks = [reader, *session.tasks.values()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _merged(self, session: StubSession, message: pb.WorkerMessage) -> pb.WorkerMessage:
        """Steps that wait behind one another leave as one, as an engine's step does for all its requests."""
        while message.HasField("step") and not session.outbox.empty():
            following = session.outbox.get_nowait()
            if not following.HasField("step"):
                session.outbox._queue.appendleft(following)  # type: ignore[attr-defined]
                break
            message.step.tokens.extend(following.step.tokens)
        return message

    async def _read(self, session: StubSession, messages: AsyncIterator[pb.RouterMessage]) -> None:
        async for message in messages:
            match message.WhichOneof("body"):
                case "submit":
                    self.submits.append(message.submit)
                    self._spawn(session, message.submit, self._prefill(session, message.submit))
                case "reserve":
                    self.reserves.append(message.reserve)
                    self._spawn(session, message.reserve.request, self._decode(session, message.reserve.request))
                case "handoff":
                    handoff = message.handoff
                    waiting = session.handoffs.get((handoff.request_id, handoff.attempt))
                    if waiting is not None and not waiting.done():
                        waiting.set_result(handoff.ticket)
                case "abort":
                    key = (message.abort.request_id, message.abort.attempt)
                    self.aborts.append(key)
                    if key in session.tasks:
                        session.tasks[key].cancel()
                case "peers":
                    for peer in message.peers.peers:
                        report = pb.LinkReport(
                            peer_id=peer.worker_id, peer_incarnation=peer.incarnation, up=True, transport="stub"
                        )
                        session.send(link=report)
                case "prefetch":
                    self.prefetches.append(message.prefetch)
                case "ping":
                    session.send(pong=pb.Pong(sequence=message.ping.sequence))

    def _spawn(self, session: StubSession, submit: pb.Submit, work: Coroutine[Any, Any, None]) -> None:
        key = (submit.request_id, submit.attempt)
        if self.next_role != pb.ROLE_UNSPECIFIED:
            work.close()
            session.send(refused=pb.Refused(request_id=key[0], attempt=key[1], reason="it drains"))
            return
        session.handoffs[key] = asyncio.get_running_loop().create_future()
        task = session.tasks[key] = asyncio.create_task(work, name=f"{self.spec.worker_id} {key}")

        def ended(_: asyncio.Task[None]) -> None:
            session.tasks.pop(key, None)
            session.handoffs.pop(key, None)

        task.add_done_callback(ended)

    # --- a request ---

    async def _prefill(self, session: StubSession, submit: pb.Submit) -> None:
        await self.at("submit", session, submit)
        cached_tokens = self._store(session, submit)
        await asyncio.sleep(self.spec.prefill_s)
        if submit.disaggregated:
            await self.at("handoff_wanted", session, submit)
            session.send(handoff_wanted=pb.HandoffWanted(request_id=submit.request_id, attempt=submit.attempt))
        await self.at("first_token", session, submit)
        times = pb.StageTimes(compute_s=self.spec.prefill_s)
        if not submit.disaggregated:
            await self._generate(session, submit, len(submit.output_token_ids), times, cached_tokens)
            return
        start = len(submit.output_token_ids)
        [token] = oracle_tokens(submit.prompt_token_ids, submit.sampling, 1, start=start)
        event = self._token(submit, start, token)
        event.times.CopyFrom(times)
        event.cached_by_tier["device"] = cached_tokens
        self.emit(session, event)
        if event.finish == pb.RUNNING:
            ticket = await session.handoffs[submit.request_id, submit.attempt]
            await self.at("handoff", session, submit)
            arrival = self._fabric.arrivals.get(_ticket_id(ticket))
            if arrival is not None and not arrival.done():
                arrival.set_result([*submit.output_token_ids, token])

    async def _decode(self, session: StubSession, submit: pb.Submit) -> None:
        await self.at("reserve", session, submit)
        ticket = pb.Ticket(
            ticket_id=self._next_ticket,
            decode_worker_id=self.spec.worker_id,
            decode_incarnation=self.spec.incarnation,
        )
        self._next_ticket += 1
        arrival = self._fabric.arrivals[_ticket_id(ticket)] = asyncio.get_running_loop().create_future()
        session.send(reserved=pb.Reserved(request_id=submit.request_id, attempt=submit.attempt, ticket=ticket))
        try:
            output = await arrival
        finally:
            del self._fabric.arrivals[_ticket_id(ticket)]
        await self.at("commit", session, submit)
        self._store(session, submit)
        await self._generate(session, submit, len(output), pb.StageTimes(transfer_s=1e-6), 0)

    async def _generate(
        self, session: StubSession, submit: pb.Submit, start: int, times: pb.StageTimes, cached_tokens: int
    ) -> None:
        for index, token in enumerate(
            oracle_tokens(submit.prompt_token_ids, submit.sampling, submit.sampling.max_tokens, start=start), start
        ):
            event = self._token(submit, index, token)
            if index == start:
                event.times.CopyFrom(times)
                event.cached_by_tier["device"] = cached_tokens
            self.emit(session, event)
            await self._step_end()
            if index == start + 1:
                await self.at("decode", session, submit)

    async def _step_end(self) -> None:
        step_s = self.spec.token_s
        await asyncio.sleep(step_s - asyncio.get_running_loop().time() % step_s if step_s else 0.0)

    def _token(self, submit: pb.Submit, index: int, token: int) -> pb.TokenEvent:
        return pb.TokenEvent(
            request_id=submit.request_id,
            attempt=submit.attempt,
            index=index,
            token_id=token,
            finish=finish_after(index, token, submit.sampling),
        )

    def _store(self, session: StubSession, submit: pb.Submit) -> int:
        """Keep the blocks of the prompt; how many of its tokens were there before."""
        tokens = [*submit.prompt_token_ids, *submit.output_token_ids]
        keys = block_keys(BlockKey(submit.root_key), tokens, self.spec.block_size)
        new = [key for key in keys if key not in self._held]
        if new and len(self._held) + len(new) <= self.spec.num_blocks:
            self._held.update(dict.fromkeys(new))
            for each in self.sessions:
                each.send_events(new)
        return (len(keys) - len(new)) * self.spec.block_size

    def _hello(self) -> pb.WorkerHello:
        spec = self.spec
        return pb.WorkerHello(
            protocol_version=PROTOCOL_VERSION,
            worker_id=spec.worker_id,
            incarnation=spec.incarnation,
            role=self.role,
            next_role=self.next_role,
            model=spec.model,
            fingerprint=spec.fingerprint,
            block_size=spec.block_size,
            block_bytes=1024,
            num_blocks=spec.num_blocks,
            max_model_len=spec.num_blocks * spec.block_size,
            max_sequences=1024,
            address=self.address,
            vocab_size=VOCAB_SIZE,
            has_store=spec.has_store,
        )

    def _send_load(self, session: StubSession) -> None:
        blocks = self.spec.num_blocks
        session.send(load=pb.LoadReport(free_blocks=blocks, total_blocks=blocks))


def _ticket_id(ticket: pb.Ticket) -> TicketId:
    return ticket.decode_worker_id, ticket.decode_incarnation, ticket.ticket_id


async def _serve() -> None:
    worker = StubWorker(StubSpec("stub", pb.MIXED, token_s=_STEP_S), Fabric())
    print(await worker.start(), flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve())
