"""Which worker had better have another role: predicted goodput of the fleet as it is, and with one of them changed.

A request needs prefill and decode, so the fleet serves what the scarcer of the two allows. What one worker can do and
still meet the class of the requests that come:

    prefill   rate / tokens of one, at the load whose mean wait (M/D/1) leaves TTFT in time
    decode    the largest batch whose step meets TPOT and whose context fits the pool, a step a token

A mixed worker does either, with the share of its time that is scarce. It is never advised to become one: what a prompt
does to the steps beside it is not in this model, so mixing would always look free.

Hysteresis: a gain must be worth it, last for a while, and come some time after the last change; to undo that one, it
must be twice as large for a longer while. A change costs a drain and cold links, and the demand is an estimate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from router.demand import Demand
from router.policy import Role
from router.step_model import StepModel

HEADROOM = 1.2  # demand that the fleet is judged by: what it will meet soon counts
LEAST_GAIN = 0.1
HOLD_S = 30.0
COOL_S = 120.0
REGRET_S = 600.0
_ROUNDS = 40


@dataclass(frozen=True, slots=True)
class WorkerView:
    worker_id: str
    role: Role
    prefill_tokens_per_s: float
    step: StepModel
    max_sequences: int
    pool_tokens: int
    sequences: int  # that it runs now: of several equal ones the idlest changes


@dataclass(frozen=True, slots=True)
class Advice:
    """`worker_id` had better become `to_role`. Requests/s that are served within their class, foreseen."""

    worker_id: str
    from_role: Role
    to_role: Role
    goodput_rps: float
    goodput_after_rps: float
    since_s: float  # that it has been so
    ripe: bool  # long enough to be acted on

    @property
    def gain(self) -> float:
        return self.goodput_after_rps / self.goodput_rps - 1.0 if self.goodput_rps else float("inf")

    def describe(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "worker_id": self.worker_id,
            "from_role": self.from_role.value,
            "to_role": self.to_role.value,
            "goodput_rps": round(self.goodput_rps, 3),
            "goodput_after_rps": round(self.goodput_after_rps, 3),
            "gain": round(min(self.gain, 1e6), 3),
            "ripe": self.ripe,
        }


def prefill_rps(worker: WorkerView, demand: Demand) -> float:
    """Requests/s whose prompts it computes in time, if it does nothing else."""
    one_s = max(demand.uncached_tokens, 1.0) / worker.prefill_tokens_per_s
    spare_s = demand.ttft_s - one_s
    if spare_s <= 0.0:
        return 0.0
    # M/D/1: the mean wait is load / (2 * (1 - load)) of one prompt's time.
    load = 2.0 * spare_s / (2.0 * spare_s + one_s)
    return load / one_s


def decode_rps(worker: WorkerView, demand: Demand) -> float:
    """Requests/s whose answers it generates in time, if it does nothing else."""
    context = max(demand.context_tokens, 1.0)
    batch = min(worker.max_sequences, worker.step.largest_batch(demand.tpot_s, context), worker.pool_tokens / context)
    if batch < 1.0:
        return 0.0
    return batch / (max(demand.output_tokens, 1.0) * worker.step.step_s(batch, batch * context))


def capacity_rps(workers: Sequence[WorkerView], demand: Demand) -> float:
    """Requests/s that all of them serve together, each within its class."""
    prefill = sum(prefill_rps(each, demand) for each in workers if each.role is Role.PREFILL)
    decode = sum(decode_rps(each, demand) for each in workers if each.role is Role.DECODE)
    mixed = [(prefill_rps(each, demand), decode_rps(each, demand)) for each in workers if each.role is Role.MIXED]
    if not mixed:
        return min(prefill, decode)
    # The mean of the mixed ones: they have one kind of machine, or nearly.
    one_prefill, one_decode = (sum(rates) / len(mixed) for rates in zip(*mixed, strict=True))

    def served(rate: float) -> bool:
        short = (max(0.0, rate - prefill), one_prefill), (max(0.0, rate - decode), one_decode)
        return sum(missing / one if one else float("inf") for missing, one in short if missing) <= len(mixed)

    low, high = 0.0, prefill + decode + sum(map(sum, mixed))
    for _ in range(_ROUNDS):
        middle = (low + high) / 2.0
        low, high = (middle, high) if served(middle) else (low, middle)
    return low


def goodput_rps(workers: Sequence[WorkerView], demand: Demand) -> float:
    return min(HEADROOM * demand.requests_per_s, capacity_rps(workers, demand))


def best_change(workers: Sequence[WorkerView], demand: Demand) -> tuple[WorkerView, Role, float] | None:
    """Who, to which role, and the goodput then; None when no change leaves more."""
    best: tuple[float, int, str, WorkerView, Role] | None = None
    for at, worker in enumerate(workers):
        for role in (Role.PREFILL, Role.DECODE):
            if role is worker.role:
                continue
            after = goodput_rps([*workers[:at], replace(worker, role=role), *workers[at + 1 :]], demand)
            found = (-after, worker.sequences, worker.worker_id, worker, role)
            if best is None or found[:3] < best[:3]:
                best = found
    if best is None or -best[0] <= goodput_rps(workers, demand):
        return None
    return best[3], best[4], -best[0]


class Balancer:
    """Looked at now and then; time is passed in, in seconds, never decreasing."""

    def __init__(self) -> None:
        self._change: tuple[Role, Role] | None = None  # that has looked best
        self._since_s = 0.0
        self._last: tuple[Role, Role] | None = None
        self._changed_s = float("-inf")

    def look(self, now_s: float, workers: Sequence[WorkerView], demand: Demand | None) -> Advice | None:
        found = best_change(workers, demand) if demand is not None else None
        if found is None or demand is None:
            self._change = None
            return None
        worker, role, after = found
        change, before = (worker.role, role), goodput_rps(workers, demand)
        undoes = change[::-1] == self._last and now_s < self._changed_s + REGRET_S
        if after < (1.0 + (2.0 if undoes else 1.0) * LEAST_GAIN) * before:
            self._change = None
            return None
        if change != self._change:
            self._change, self._since_s = change, now_s
        held_s = now_s - self._since_s
        ripe = held_s >= (4.0 if undoes else 1.0) * HOLD_S and now_s >= self._changed_s + COOL_S
        return Advice(worker.worker_id, worker.role, role, before, after, held_s, ripe)

    def changed(self, now_s: float, from_role: Role, to_role: Role) -> None:
        """A worker changed, whoever asked for it."""
        self._change, self._last, self._changed_s = None, (from_role, to_role), now_s
