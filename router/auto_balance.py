"""Advice about roles from what the fleet has measured, looked at every few seconds; acted on only when told to."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from statistics import median
from typing import Any

from kvstore.background import keep_running
from pdserve.errors import ServeError
from router.balance import Advice, Balancer, WorkerView, capacity_rps
from router.demand import DemandMeter
from router.fleet import Fleet
from router.member import Member
from router.policy import Role, Speed
from router.roles import RoleChanger
from router.step_model import USUAL_STEP

log = logging.getLogger(__name__)

EVERY_S = 5.0


class AutoBalance:
    """
    Attributes:
        advice: the last one; None: the roles are right, or too little is known.
    """

    def __init__(self, fleet: Fleet, meter: DemandMeter, *, acts: bool) -> None:
        self.advice: Advice | None = None
        self._fleet = fleet
        self._meter = meter
        self._acts = acts
        self._balancer = Balancer()
        self._roles = RoleChanger(fleet)
        self._seen_changes = fleet.role_changes.copy()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = keep_running(self._run, "balance")

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def describe(self) -> dict[str, Any]:
        """JSON-ready."""
        demand, workers = self._meter.now(time.monotonic()), views(self._fleet.in_use())
        return {
            "acts": self._acts,
            "demand_rps": round(demand.requests_per_s, 3) if demand is not None else None,
            "capacity_rps": round(capacity_rps(workers, demand), 3) if demand is not None else None,
            "advice": self.advice.describe() if self.advice is not None else None,
        }

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(EVERY_S)
            await self.look(time.monotonic())

    async def look(self, now_s: float) -> None:
        """One look, and what follows from it."""
        for before_role, after_role in self._fleet.role_changes - self._seen_changes:
            self._balancer.changed(now_s, Role(before_role), Role(after_role))
        self._seen_changes = self._fleet.role_changes.copy()
        before = self.advice
        self.advice = None
        if any(member.next_role is not None for member in self._fleet.known()):
            return  # one at a time: what it brings is seen first
        self.advice = self._balancer.look(now_s, views(self._fleet.in_use()), self._meter.now(now_s))
        if self.advice is not None and self.advice.ripe and not (before is not None and before.ripe):
            log.info("advice: %s", self.advice.describe())
        if self._acts and self.advice is not None and self.advice.ripe:
            try:
                await self._roles.change(self.advice.worker_id, self.advice.to_role)
            except ServeError as error:
                log.warning("advice not followed: %s", error.message)


def views(members: Sequence[Member]) -> list[WorkerView]:
    """What one was not measured at yet counts as the others' median."""
    rates = [_rate(each.learner.speed) for each in members if each.learner.speed.prefill_tokens_per_s]
    rate = median(rates) if rates else _rate(Speed())
    most = max(members, key=lambda each: each.steps.count, default=None)
    step = most.steps.model if most is not None and most.steps.count else USUAL_STEP
    return [
        WorkerView(
            worker_id=each.worker_id,
            role=each.role,
            prefill_tokens_per_s=_rate(each.learner.speed) if each.learner.speed.prefill_tokens_per_s else rate,
            step=each.steps.model if each.steps.count else step,
            max_sequences=each.hello.max_sequences,
            pool_tokens=each.hello.num_blocks * each.hello.block_size,
            sequences=each.busy_sequences,
        )
        for each in members
    ]


def _rate(speed: Speed) -> float:
    """Tokens/s of long prompts, which are what a prefill worker's time goes to."""
    return speed.prefill_rates()[-1]
