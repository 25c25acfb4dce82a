"""A prefill and a decode worker that take time as real ones do, behind a real fleet and dispatcher, in virtual time.

Prompts are computed one after the other, decode steps last by their batch, and both vary: each by itself, and all
together in phases, as on a machine that others use too.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from dataclasses import dataclass, field
from typing import Any, cast

from pdserve.discovery import StaticDiscovery
from pdserve.errors import Overloaded, ServeError
from pdserve.protocol import worker_pb2 as pb
from pdserve.request import Request, SamplingParams
from pdserve.timeline import Timeline
from router.admission import Mode
from router.dispatch import RouterDispatcher
from router.fleet import Fleet
from router.limits import RouterLimits
from router.link import WorkerLink
from router.member import Member
from router.policy import POLICIES
from router.slo import CLASSES, STANDARD, SloClass
from router.wishes import Wishes

BLOCK_SIZE = 16
_TRANSIT_S = 0.002


@dataclass(frozen=True, slots=True)
class Machine:
    """How long things take, in seconds."""

    prefill_tokens_per_s: float = 700.0
    step_s: float = 0.030
    per_sequence_s: float = 0.003
    spread: float = 0.15  # of each duration, as the sigma of a lognormal factor
    slow_factor: float = 1.0  # in a slow phase
    phase_s: float = 8.0  # mean length of a phase


@dataclass(slots=True)
class Weather:
    machine: Machine
    draw: random.Random
    slow: bool = False
    until_s: float = 0.0

    def factor(self) -> float:
        now_s = time.monotonic()
        while now_s >= self.until_s:
            self.slow = not self.slow
            self.until_s = max(self.until_s, now_s) + self.draw.expovariate(1.0 / self.machine.phase_s)
        return (self.machine.slow_factor if self.slow else 1.0) * self.draw.lognormvariate(0.0, self.machine.spread)


class _Link:
    """In place of a session: messages reach the worker, and its messages the fleet, after a transit."""

    up, suspect, last_error = True, False, ""

    def __init__(self, address: str, worker: SimulatedWorker) -> None:
        self.address = address
        self._worker = worker

    def send(self, message: pb.RouterMessage) -> bool:
        asyncio.get_running_loop().call_later(_TRANSIT_S, self._worker.handle, message)
        return True

    def renew(self, reason: str) -> None: ...

    async def close(self) -> None: ...


class SimulatedWorker:
    def __init__(self, name: str, role: pb.Role, weather: Weather, fleet: Fleet, slot: int) -> None:
        self.name, self.role = name, role
        self._weather = weather
        self._fleet = fleet
        self.link = cast("WorkerLink", _Link(f"sim:{slot}", self))
        self._waiting: dict[str, tuple[pb.Submit, float]] = {}  # prompts, oldest first
        self._running: dict[str, list[Any]] = {}  # submit, index of the next token, times to tell
        self._computed: set[str] = set()  # prompts without a ticket
        self._tickets: dict[str, SimulatedWorker] = {}
        self._wake = asyncio.Event()
        self._step_s = 0.0
        fleet._members[self.link.address] = fleet._by_link[self.link] = Member(slot, fleet.columns, self.link, 0.0)
        fleet.link_up(self.link, self._hello())
        self.tell(kv_events=pb.KvEvents(sequence=0, snapshot=True))
        self.tell_load()
        self.task = asyncio.create_task(self._prefill() if role == pb.PREFILL else self._decode())

    def tell(self, **body: Any) -> None:
        message = pb.WorkerMessage(**body)
        asyncio.get_running_loop().call_later(_TRANSIT_S, self._fleet.link_message, self.link, message)

    def tell_load(self) -> None:
        self.tell(
            load=pb.LoadReport(
                waiting_sequences=max(0, len(self._waiting) - 1),
                running_sequences=len(self._running) + bool(self._waiting),
                waiting_tokens=sum(len(submit.prompt_token_ids) for submit, _ in self._waiting.values()),
                context_tokens=sum(len(each[0].prompt_token_ids) + (each[1] or 0) for each in self._running.values()),
                free_blocks=100_000,
                total_blocks=100_000,
                step_s=self._step_s,
            )
        )

    def handle(self, message: pb.RouterMessage) -> None:
        match message.WhichOneof("body"):
            case "submit":
                self._waiting[message.submit.request_id] = message.submit, time.monotonic()
                self._wake.set()
            case "reserve":
                request = message.reserve.request
                ticket = pb.Ticket(ticket_id=1, decode_worker_id=self.name, decode_incarnation=1)
                self._running[request.request_id] = [request, None, None]
                self.tell(reserved=pb.Reserved(request_id=request.request_id, attempt=request.attempt, ticket=ticket))
            case "handoff":
                self._tickets[message.handoff.request_id] = self._peer(message.handoff.ticket.decode_worker_id)
                self._push(message.handoff.request_id)
            case "abort":
                self._waiting.pop(message.abort.request_id, None)
                self._running.pop(message.abort.request_id, None)
            case "peers":
                for each in message.peers.peers:
                    self.tell(link=pb.LinkReport(peer_id=each.worker_id, peer_incarnation=1, up=True, transport="sim"))

    def _push(self, request_id: str) -> None:
        """When the prompt is computed and its ticket is there."""
        if request_id in self._computed and request_id in self._tickets:
            self._computed.discard(request_id)
            asyncio.get_running_loop().call_later(0.01, self._tickets.pop(request_id).arrived, request_id)

    def arrived(self, request_id: str) -> None:
        if (running := self._running.get(request_id)) is not None:
            running[1], running[2] = 1, pb.StageTimes(transfer_s=0.01)
            self._wake.set()

    def _peer(self, name: str) -> SimulatedWorker:
        member = self._fleet.member(name)
        assert member is not None
        return cast("_Link", member.link)._worker

    async def _prefill(self) -> None:
        while True:
            while not self._waiting:
                self._wake.clear()
                await self._wake.wait()
            request_id, (submit, received_s) = next(iter(self._waiting.items()))
            began_s = time.monotonic()
            self.tell(handoff_wanted=pb.HandoffWanted(request_id=request_id, attempt=submit.attempt))
            tokens = len(submit.prompt_token_ids)
            self._step_s = tokens / self._weather.machine.prefill_tokens_per_s * self._weather.factor()
            await asyncio.sleep(self._step_s)
            self._waiting.pop(request_id, None)
            times = pb.StageTimes(queue_s=began_s - received_s, compute_s=self._step_s)
            self._token(submit, 0, times)
            self._computed.add(request_id)
            self._push(request_id)
            self.tell_load()

    async def _decode(self) -> None:
        while True:
            batch = [each for each in self._running.values() if each[1] is not None]
            if not batch:
                self._wake.clear()
                await self._wake.wait()
                continue
            machine = self._weather.machine
            self._step_s = (machine.step_s + machine.per_sequence_s * len(batch)) * self._weather.factor()
            await asyncio.sleep(self._step_s)
            for each in batch:
                submit, index, times = each
                self._token(submit, index, times)
                each[1], each[2] = index + 1, None
                if index + 1 >= submit.sampling.max_tokens:
                    self._running.pop(submit.request_id, None)
            self.tell_load()

    def _token(self, submit: pb.Submit, index: int, times: pb.StageTimes | None) -> None:
        last = index + 1 >= submit.sampling.max_tokens
        event = pb.TokenEvent(
            request_id=submit.request_id,
            attempt=submit.attempt,
            index=index,
            token_id=7,
            finish=pb.LENGTH if last else pb.RUNNING,
            times=times,
        )
        self.tell(step=pb.StepOutput(tokens=[event]))

    def _hello(self) -> pb.WorkerHello:
        return pb.WorkerHello(
            worker_id=self.name,
            incarnation=1,
            role=self.role,
            model="sim",
            fingerprint=b"sim",
            block_size=BLOCK_SIZE,
            block_bytes=1024,
            num_blocks=100_000,
            max_model_len=100_000,
            max_sequences=64,
            vocab_size=1 << 20,
        )


@dataclass(slots=True)
class Traffic:
    """What became of the requests of one stretch of Poisson arrivals."""

    rate_rps: float
    duration_s: float
    good: int = 0
    served: int = 0
    refused: int = 0
    requests: int = 0
    slowest_refusal_s: float = 0.0
    failed: list[str] = field(default_factory=list)

    @property
    def goodput_rps(self) -> float:
        return self.good / self.duration_s


class SimulatedCluster:
    """Made and used inside `run_virtual`."""

    def __init__(self, machine: Machine, mode: Mode, seed: int = 0) -> None:
        self._draw = random.Random(seed)
        self.fleet = Fleet(StaticDiscovery([]), "sim", RouterLimits().fleet)
        self.dispatcher = RouterDispatcher(self.fleet, POLICIES["cost"], RouterLimits(), mode=mode)
        self.fleet._listener = self.dispatcher
        weather = Weather(machine, random.Random(seed + 1))
        self._workers = [
            SimulatedWorker(name, role, weather, self.fleet, slot)
            for slot, (name, role) in enumerate((("p0", pb.PREFILL), ("d0", pb.DECODE)))
        ]
        self._ids = itertools.count()

    async def close(self) -> None:
        for worker in self._workers:
            worker.task.cancel()
        await asyncio.gather(*(worker.task for worker in self._workers), return_exceptions=True)

    async def arrivals(
        self,
        rate_rps: float,
        duration_s: float,
        prompt_tokens: int = 400,
        output_tokens: int = 32,
        slo: SloClass = CLASSES[STANDARD],
    ) -> Traffic:
        """Sends them and waits for the last answer."""
        traffic, clients = Traffic(rate_rps, duration_s), []
        until_s = time.monotonic() + duration_s
        while True:
            await asyncio.sleep(self._draw.expovariate(rate_rps))
            if time.monotonic() >= until_s:
                break
            clients.append(asyncio.create_task(self._client(traffic, prompt_tokens, output_tokens, slo)))
        await asyncio.gather(*clients)
        return traffic

    async def _client(self, traffic: Traffic, prompt_tokens: int, output_tokens: int, slo: SloClass) -> None:
        traffic.requests += 1
        began_s = time.monotonic()
        request = Request(
            request_id=f"r{next(self._ids)}",
            prompt_token_ids=tuple(self._draw.randrange(1 << 20) for _ in range(prompt_tokens)),
            sampling=SamplingParams(max_tokens=output_tokens, seed=1, temperature=0.0),
            root_key=self.fleet.root_key(b""),
            deadline_s=began_s + 120.0,
        )
        times_s: list[float] = []
        try:
            generation = self.dispatcher.start(request, Timeline(received_s=began_s), Wishes(slo=slo))
            async for item in generation:
                times_s += [time.monotonic()] * len(item.token_ids)
        except Overloaded:
            traffic.refused += 1
            traffic.slowest_refusal_s = max(traffic.slowest_refusal_s, time.monotonic() - began_s)
            return
        except ServeError as error:
            traffic.failed.append(str(error))
            return
        traffic.served += 1
        tpot_s = (times_s[-1] - times_s[0]) / (len(times_s) - 1)
        traffic.good += times_s[0] - began_s <= slo.ttft_s and tpot_s <= slo.tpot_s
