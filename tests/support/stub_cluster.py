"""Stub workers behind a real fleet and dispatcher, with limits short enough to wait for."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from pdserve.discovery import StaticDiscovery
from pdserve.protocol import worker_pb2 as pb
from pdserve.protocol.codec import sampling_to_proto
from pdserve.request import FinishReason, Request, SamplingParams
from pdserve.timeline import Timeline
from router.admission import Mode
from router.bench.stub_worker import StubWorker, oracle_tokens
from router.dispatch import RouterDispatcher
from router.fleet import Fleet
from router.limits import FleetLimits, LinkLimits, RouterLimits
from router.policy import POLICIES, Role
from router.routed import RoutedGeneration
from router.wishes import Wishes

LIMITS = RouterLimits(
    queue_wait_s=1.5,
    first_token_s=1.0,
    inter_token_s=1.0,
    reserve_s=0.5,
    handoff_wait_s=1.0,
    handoff_base_s=1.0,
    fleet=FleetLimits(poll_s=0.05, warmup_s=0.5, link=LinkLimits(ping_s=0.2, suspect_s=0.5, dead_s=0.9)),
)


class StubCluster:
    """Use as an asynchronous context manager; `ready` links at entry, proof of emptiness at exit."""

    def __init__(
        self,
        *workers: StubWorker,
        policy: str = "round_robin",
        limits: RouterLimits = LIMITS,
        mode: Mode = Mode.SHADOW,
        skips_handoffs: bool = False,
    ) -> None:
        self.workers = {worker.spec.worker_id: worker for worker in workers}
        self._policy = policy
        self._limits = limits
        self._mode = mode
        self._skips_handoffs = skips_handoffs
        self._ids = itertools.count()

    async def __aenter__(self) -> StubCluster:
        self._tasks_before = asyncio.all_tasks()
        addresses = [await worker.start() for worker in self.workers.values()]
        self.fleet = Fleet(StaticDiscovery(addresses), "test", self._limits.fleet)
        self.dispatcher = RouterDispatcher(
            self.fleet, POLICIES[self._policy], self._limits, mode=self._mode, skips_handoffs=self._skips_handoffs
        )
        self.fleet.start(self.dispatcher)
        await until(
            lambda: sum(n for (_, state), n in self.fleet.counts().items() if state == "ready") == len(addresses)
        )
        decoders = sum(worker.spec.role == pb.DECODE for worker in self.workers.values())
        await until(lambda: all(m.partners == decoders for m in self.members() if m.role is Role.PREFILL))
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        if exc_info[0] is None:
            assert self.dispatcher.num_active == 0
            await until(self.workers_idle)
        await self.fleet.close()
        for worker in self.workers.values():
            await worker.stop()
        if exc_info[0] is None:
            await until(lambda: not self.leaked_tasks(), describe=lambda: str(self.leaked_tasks()))
            assert all(member.sequences == 0 for member in self.members())
            assert all(member.outstanding_tokens == 0 for member in self.members())

    def members(self):  # type: ignore[no-untyped-def]
        return self.fleet._by_id.values()

    def workers_idle(self) -> bool:
        """No worker has an attempt left that a router could still ask about."""
        return not any(session.tasks for worker in self.workers.values() for session in worker.sessions)

    def leaked_tasks(self) -> set[asyncio.Task[object]]:
        """Ours; gRPC may keep a task that waits for the status of a call whose last write failed."""
        return {task for task in asyncio.all_tasks() - self._tasks_before if "grpc/_cython" not in repr(task)}

    def request(
        self, sampling: SamplingParams, prompt_tokens: int = 40, deadline_s: float = 20.0, first_token: int = 0
    ) -> Request:
        """Prompts with the same first token share what they can."""
        return Request(
            request_id=f"r{next(self._ids)}",
            prompt_token_ids=tuple(range(first_token, first_token + prompt_tokens)),
            sampling=sampling,
            root_key=self.fleet.root_key(b""),
            deadline_s=time.monotonic() + deadline_s,
        )

    def start(
        self,
        sampling: SamplingParams,
        prompt_tokens: int = 40,
        deadline_s: float = 20.0,
        first_token: int = 0,
        **wishes: Any,
    ) -> RoutedGeneration:
        """`wishes` as in `Wishes`."""
        request = self.request(sampling, prompt_tokens, deadline_s, first_token)
        return self.dispatcher.start(request, Timeline(received_s=time.monotonic()), Wishes(**wishes))


GREEDY = SamplingParams(max_tokens=20, seed=11, temperature=0.0)


def expected(generation: RoutedGeneration) -> list[int]:
    request = generation.request
    sampling = sampling_to_proto(request.sampling)
    return oracle_tokens(request.prompt_token_ids, sampling, request.sampling.max_tokens)


async def collect(generation: RoutedGeneration) -> tuple[list[int], FinishReason | None]:
    """All tokens and how it ended; exactly one item has the end."""
    token_ids: list[int] = []
    finish: FinishReason | None = None
    try:
        async with asyncio.timeout(20):
            async for item in generation:
                assert finish is None, "an item came after the end"
                token_ids += item.token_ids
                finish = item.finish_reason
    finally:
        await accounted()
    return token_ids, finish


async def accounted() -> None:
    """What has ended is in records and counts a moment later."""
    for _ in range(3):
        await asyncio.sleep(0)


async def assert_exact(generation: RoutedGeneration) -> None:
    assert await collect(generation) == (expected(generation), FinishReason.LENGTH)


async def until(condition: Callable[[], bool], within_s: float = 8.0, describe: Callable[[], str] = str) -> None:
    deadline_s = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline_s, f"not within {within_s} s {describe()}"
        await asyncio.sleep(0.01)


def with_limits(**changes: object) -> RouterLimits:
    return replace(LIMITS, **changes)  # type: ignore[arg-type]


PREFILL, DECODE, MIXED = pb.PREFILL, pb.DECODE, pb.MIXED
