"""Workers in one event loop: real sessions and gRPC between them, the oracle model, and a transport that tests harm.

A gate before every step makes each phase of a request reachable by an event; nothing here waits by sleeping.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
from torch import Tensor

from kvstore.pool import BlockPool
from kvstore.transfer.loopback import NO_FAULT, Fault, LoopbackLink, LoopbackNetwork, LoopbackTransport, Message
from kvstore.transfer.tags import MANIFEST
from kvstore.transfer.transport import CompletionHandler
from pdserve.engine.config import EngineConfig
from pdserve.engine.engine import Engine
from pdserve.engine.runner import Runner
from pdserve.engine.torch_sampler import TorchSampler
from pdserve.kernels.base import Batch
from pdserve.protocol import worker_pb2 as pb
from pdserve.worker.build import Built
from pdserve.worker.config import LinkLimits, Role, WorkerConfig, WorkerLimits
from pdserve.worker.process import running_worker
from tests.support.oracle_model import VOCAB_SIZE, OracleModel, empty_pool
from tests.support.router_client import DEADLINE_S, Ask, RouterClient
from tests.support.tiny_engine import BLOCK_SIZE, GEOMETRY

# No limit is reached in a test that does not shorten it; probes are small.
LIMITS = WorkerLimits(tick_s=0.02, link=LinkLimits(backoff_s=(0.01, 0.05), probe_bytes=1024, check_s=0.1))
HELD = math.inf  # as a delay: until the test lets it go


class Gate(OracleModel):
    """The oracle model behind a gate: while it is closed, steps wait at it, and pass one by one as the test says."""

    def __init__(self) -> None:
        super().__init__()
        self._state = threading.Condition()
        self._passes = math.inf
        self._at_gate = False
        self._broken: list[Exception] = []

    def forward(self, token_ids: Tensor, batch: Batch, pool: Tensor) -> Tensor:
        with self._state:
            self._at_gate = True
            self._state.notify_all()
            passed = self._state.wait_for(lambda: self._passes > 0, DEADLINE_S)
            self._at_gate = False
            self._passes -= 1
            if self._broken:
                raise self._broken.pop()
        assert passed, "the test left the gate closed"
        return super().forward(token_ids, batch, pool)

    def close(self) -> None:
        with self._state:
            self._passes = 0

    def open(self) -> None:
        with self._state:
            self._passes = math.inf
            self._state.notify_all()

    def pass_step(self) -> None:
        """Let one step through."""
        with self._state:
            self._passes += 1
            self._state.notify_all()

    def break_steps(self, count: int) -> None:
        """The next `count` steps raise."""
        with self._state:
            self._broken += [RuntimeError("a step broken by the test") for _ in range(count)]

    def wait(self) -> None:
        """Until a step waits at the gate; holds up the caller's thread."""
        with self._state:
            assert self._state.wait_for(lambda: self._at_gate and self._passes <= 0, DEADLINE_S), "no step came"

    async def reached(self) -> None:
        await asyncio.to_thread(self.wait)


class HoldingTransport(LoopbackTransport):
    """Sends with the delay HELD stay under way until `let_go`; links take until `may_close` to close."""

    def __init__(self, network: LoopbackNetwork) -> None:
        self._held: list[Callable[[], None]] = []
        self.may_close = threading.Event()
        self.may_close.set()
        super().__init__(network)

    def open(self, handler: CompletionHandler, *, same_host: bool) -> LoopbackLink:
        link = super().open(handler, same_host=same_host)
        close = link.close

        def close_when_told() -> None:
            assert self.may_close.wait(DEADLINE_S), "the test held up a close"
            close()

        link.close = close_when_told  # type: ignore[method-assign]
        return link

    def schedule(self, run: Callable[[], None], delay_s: float = 0.0) -> None:
        if delay_s == HELD:
            self._held.append(run)
        else:
            super().schedule(run, delay_s)

    def let_go(self) -> None:
        held, self._held = self._held, []
        for run in held:
            super().schedule(run)


@dataclass
class Faults:
    """Harms messages of tickets by their ordinal; probes pass."""

    rules: list[tuple[Callable[[int], bool], Fault]] = field(default_factory=list)
    seen: list[int] = field(default_factory=list)  # ordinals, in the order sent

    def __call__(self, message: Message) -> Fault:
        ticket_id, ordinal = message.tag >> 16, message.tag & 0xFFFF
        if ticket_id == 0:
            return NO_FAULT
        self.seen.append(ordinal)
        return next((fault for harms, fault in self.rules if harms(ordinal)), NO_FAULT)

    @contextlib.contextmanager
    def on(self, ordinals: Callable[[int], bool], fault: Fault) -> Iterator[None]:
        self.rules.append((ordinals, fault))
        try:
            yield
        finally:
            self.rules.clear()


def blocks(ordinal: int) -> bool:
    return ordinal != MANIFEST


def manifests(ordinal: int) -> bool:
    return ordinal == MANIFEST


def everything(ordinal: int) -> bool:
    return True


@dataclass
class Node:
    """One worker, with the session of the test's router."""

    hello: pb.WorkerHello
    router: RouterClient
    gate: Gate
    transport: HoldingTransport
    engine: Engine  # its thread owns it: look at it only while nothing runs
    pings: int = 0

    def submit(self, ask: Ask, *, disaggregated: bool = True) -> None:
        self.router.send(submit=ask.submit(disaggregated=disaggregated))

    def reserve(self, ask: Ask, prefill: Node) -> None:
        self.router.send(
            reserve=pb.Reserve(
                request=ask.submit(),
                prefill_worker_id=prefill.hello.worker_id,
                prefill_incarnation=prefill.hello.incarnation,
            )
        )

    def hand_off(self, ask: Ask, ticket: pb.Ticket) -> None:
        self.router.send(handoff=pb.Handoff(request_id=ask.request_id, attempt=ask.attempt, ticket=ticket))

    def abort(self, ask: Ask) -> None:
        self.router.send(abort=pb.Abort(request_id=ask.request_id, attempt=ask.attempt))

    def list_peers(self, *nodes: Node) -> None:
        peers = [
            pb.Peer(
                worker_id=node.hello.worker_id,
                incarnation=node.hello.incarnation,
                address=node.hello.address,
                host_id=node.hello.host_id,
            )
            for node in nodes
        ]
        self.router.send(peers=pb.Peers(peers=peers))

    async def heard(self) -> None:
        """The worker has acted on all that was sent before."""
        self.pings += 1
        self.router.send(ping=pb.Ping(sequence=self.pings))
        await self.router.wait(lambda message: message.pong.sequence == self.pings or None)

    async def rejoin(self) -> None:
        """A new session, after the old one broke."""
        self.router = RouterClient(self.hello.address)
        await self.router.open()

    async def get(self, path: str) -> httpx.Response:
        async with httpx.AsyncClient(verify=False) as client:
            return await client.get(f"http://{self.hello.admin_address}{path}", timeout=DEADLINE_S)

    async def ledger(self) -> dict[str, Any]:
        found: dict[str, Any] = (await self.get("/ledger")).json()
        return found

    async def metric(self, name: str) -> float:
        lines = (await self.get("/metrics")).text.splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith((f"{name} ", f"{name}{{")))


@dataclass
class Pair:
    """`prefill` and `decode` are linked; further workers are in `nodes`."""

    nodes: list[Node]
    faults: Faults
    network: LoopbackNetwork

    @property
    def prefill(self) -> Node:
        return self.nodes[0]

    @property
    def decode(self) -> Node:
        return self.nodes[1]

    @property
    def num_links_up(self) -> int:
        """How often prefill's link came up in its present session."""
        return sum(message.link.up for message in self.prefill.router.messages)

    async def hand_over(self, ask: Ask) -> pb.Ticket:
        """Submit to prefill, reserve on decode, and bring the ticket back."""
        self.prefill.submit(ask)
        await self.prefill.router.wanted(ask)
        self.decode.reserve(ask, self.prefill)
        ticket = await self.decode.router.reserved(ask)
        self.prefill.hand_off(ask, ticket)
        return ticket

    async def run(self, ask: Ask) -> list[int]:
        """The whole output of a request that is handed over, checked as a router would."""
        await self.hand_over(ask)
        first = await self.prefill.router.event(ask)
        await self.decode.router.finished(ask)
        assert self.prefill.router.events(ask) == [first]
        assert (first.index, first.finish) == (len(ask.output), pb.RUNNING)
        return [*ask.output, first.token_id, *check_stream(self.decode.router.events(ask), len(ask.output) + 1)]

    async def linked_again(self, times_up: int) -> None:
        """Decode has closed the link, and prefill has dialled it so many times in all."""

        async def is_up() -> bool:
            return self.num_links_up == times_up

        await eventually(is_up, "the link does not come back")

    async def linked(self) -> None:
        """The pair works, again if decode had closed the link: a tiny request goes through. No block becomes full."""
        numbers = itertools.count()

        async def works() -> bool:
            ask = Ask("is it linked?", (1,), max_tokens=2, attempt=next(numbers))
            self.prefill.submit(ask)
            await self.prefill.router.wanted(ask)
            self.decode.reserve(ask, self.prefill)
            ticket = await self.decode.router.reserved_or_refused(ask)
            if ticket.ticket_id:
                self.prefill.hand_off(ask, ticket)
                end = await self.decode.router.finished(ask)
            for node in self.nodes:
                node.abort(ask)
            return bool(ticket.ticket_id) and end.finish == pb.LENGTH

        await eventually(works, "the link does not come back")
        await self.whole()

    async def whole(self) -> None:
        """Both pools come to hold free and cached blocks only, and every task started for a request has ended."""
        for node in self.nodes:
            await eventually(lambda node=node: _is_idle(node), f"{node.hello.worker_id} is not idle")  # type: ignore[misc]

    async def settled(self, num_tasks: int) -> None:
        """Whole, with no more tasks (gRPC calls are tasks too) than there were."""
        await self.whole()

        async def few() -> bool:
            return len(asyncio.all_tasks()) <= num_tasks

        await eventually(few, f"more than {num_tasks} tasks")


async def _is_idle(node: Node) -> bool:
    ledger = await node.ledger()
    return bool(ledger.get("idle")) and not ledger["holds"]


async def eventually(condition: Callable[[], Any], otherwise: str, within_s: float = DEADLINE_S) -> None:
    """For a state that nobody announces."""
    try:
        async with asyncio.timeout(within_s):
            while not await condition():
                await asyncio.sleep(0.005)
    except TimeoutError:
        raise AssertionError(f"{otherwise}: {[str(task) for task in asyncio.all_tasks()]}") from None


def check_stream(events: list[pb.TokenEvent], start: int) -> list[int]:
    """The tokens of a stream that ends well: contiguous indices from `start`, one terminal event, the last."""
    assert [event.index for event in events] == list(range(start, start + len(events)))
    assert [event.finish != pb.RUNNING for event in events] == [False] * (len(events) - 1) + [True]
    assert not any(event.no_token or event.error for event in events), events
    return [event.token_id for event in events]


@contextlib.asynccontextmanager
async def running_node(
    network: LoopbackNetwork,
    worker_id: str,
    role: Role,
    *,
    limits: WorkerLimits = LIMITS,
    num_blocks: int = 32,
    tokens: int = 16,
    sequences: int = 8,
    max_waiting: int = 64,
    weights: str = "oracle",
    store: Path | None = None,
) -> AsyncIterator[Node]:
    """`tokens` and `sequences` bound a step; `weights` is what the fingerprint names; `store` a store node's socket."""
    engine_config = EngineConfig(
        num_blocks=num_blocks,
        block_size=BLOCK_SIZE,
        max_batched_tokens=tokens,
        max_sequences=sequences,
        max_waiting=max_waiting,
        max_model_len=num_blocks * BLOCK_SIZE,
    )
    gate = Gate()
    runner = Runner(gate, empty_pool(GEOMETRY, num_blocks), TorchSampler())
    engine = Engine(engine_config, BlockPool(num_blocks, BLOCK_SIZE), runner)
    built = Built(engine, GEOMETRY, GEOMETRY.fingerprint(weights), eos_token_ids=(), vocab_size=VOCAB_SIZE)
    config = WorkerConfig(role=role, worker_id=worker_id, model=Path("oracle"), limits=limits, store=store)
    transport = HoldingTransport(network)
    async with running_worker(config, built, transport) as hello:
        node = Node(hello, RouterClient(hello.address), gate, transport, engine)
        try:
            await node.router.open()
            yield node
        finally:
            gate.open()
            transport.may_close.set()
            await node.router.close()


@contextlib.asynccontextmanager
async def worker_pair(*, prefill_options: dict[str, Any] | None = None, **options: Any) -> AsyncIterator[Pair]:
    """A prefill worker linked to a decode worker; afterwards nothing of them is left: no task, no thread."""
    before = asyncio.all_tasks()
    faults = Faults()
    network = LoopbackNetwork(faults)
    nodes = [
        running_node(network, "p", Role.PREFILL, **{**options, **(prefill_options or {})}),
        running_node(network, "d", Role.DECODE, **options),
    ]
    try:
        prefill, decode = [await node.__aenter__() for node in nodes]
        prefill.list_peers(decode)
        await prefill.router.link("d", up=True)
        yield Pair([prefill, decode], faults, network)
    finally:
        # At the same time: half of a test's time is the end of its workers.
        await asyncio.gather(*(node.__aexit__(None, None, None) for node in nodes))
    left = {task for task in asyncio.all_tasks() - before if not task.done()}
    assert not left, left
    threads = [thread.name for thread in threading.enumerate() if thread.name in ("engine", "loopback-progress")]
    assert not threads, threads


def shorter(**limits: float) -> WorkerLimits:
    return replace(LIMITS, **limits)  # type: ignore[arg-type]


def prompt_of(length: int, salt: int = 0) -> tuple[int, ...]:
    """Some tokens; different for each salt from the first token on."""
    return tuple((salt * 7 + position * position + 3 * position + 1) % VOCAB_SIZE for position in range(length))
