"""The central queue at work: each worker gets what keeps it busy, the rest waits here for its turn.

So a choice is made when its worker has room, with what is known then, and a worker that dies takes little with it.

    place ─> look ─> judge (router.admission) ─> wait ─> turn (router.queue) ─> look again ─> placed
                       └ refused                  └ deadline, no worker, client gone

A worker is free while what it has of prompts will be computed before more could arrive: within one of its steps and
one transit. A request waits for the worker that is best for it, if that is better than a free one: those before it that
wait for the same worker count as its load. Only within the synchronous parts of this module, so nobody else sees them.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from prometheus_client import Histogram

from pdserve.errors import DeadlineExceeded, Overloaded
from router.admission import Confidence, Forecast, Mode, judge, no_place, refusal
from router.decode_room import DecodeRoom, decode_room
from router.fleet import Fleet
from router.handoff import TICK_S
from router.limits import RouterLimits
from router.member import Member
from router.metrics import STAGE_BUCKETS_S
from router.placement import Placed
from router.policy import Considered, Decision, Role
from router.predictor import Predictor
from router.queue import RequestQueue, ahead_of
from router.refusals import RefusalLedger
from router.slo import CLASSES, SloClass
from router.waiting import Plans, Waiting

_STRICTEST_S = min(each.tpot_s for each in CLASSES.values())
_LOOKS = 64  # decisions at a time, so that a long queue does not hold up the event loop


@dataclass(frozen=True, slots=True)
class Depth:
    requests: int = 0
    tokens: int = 0  # of their prompts, those that no worker has

    def plus(self, tokens: int) -> Depth:
        return Depth(self.requests + 1, self.tokens + tokens)


def wait_histogram() -> Histogram:
    text = "How long requests waited in the router's queue for their turn."
    return Histogram("pdserve_queue_seconds", text, ("slo_class",), registry=None, buckets=STAGE_BUCKETS_S)


class Feeder:
    def __init__(self, fleet: Fleet, predictor: Predictor, limits: RouterLimits, mode: Mode) -> None:
        self.mode = mode
        self.ledger = RefusalLedger()
        self.wait_seconds = wait_histogram()
        self._fleet = fleet
        self._predictor = predictor
        self._limits = limits
        self._confidence = Confidence()
        self._queue: RequestQueue[Waiting] = RequestQueue(limits.queue_places)
        self._running: dict[str, float] = {}  # by request that was placed and has not ended: the TPOT it asks of others
        self._tpots_s: Counter[float] = Counter()  # how many of them ask each
        self._pump: asyncio.Task[None] | None = None

    def depths(self) -> Mapping[str, int]:
        """Requests that wait, by SLO class."""
        return self._queue.depths()

    def backlog(self) -> dict[tuple[str, str], Depth]:
        """What waits, by SLO class and by what it waits for: "prefill", "decode" or any "worker" at all."""
        now_s = time.monotonic()
        idle = any(self._free(worker, now_s) for worker in self._prompt_workers())
        found: dict[tuple[str, str], Depth] = {}
        for item in self._queue:
            wants = "worker" if item.plan is None else "decode" if idle and item.wants_decode else "prefill"
            key = item.slo.name, wants
            found[key] = found.get(key, Depth()).plus(item.plan[1] if item.plan is not None else 0)
        return found

    def predicted_wait_s(self, slo: SloClass) -> float | None:
        """In the queue, of a short prompt of this class that would come now; None while there is no worker."""
        now_s = time.monotonic()
        workers = self._prompt_workers()
        if not workers:
            return None
        first = min(workers, key=lambda each: each.backlog_s(now_s))
        before = [item for item in self._queue if item.due_s <= now_s + slo.ttft_s]
        prompts_s = self._predictor.prompt.factor * first.backlog_s(now_s)
        prompts_s += sum(item.work_s for item in before) / len(workers)
        room = decode_room(self._fleet.in_use(), first, self._predictor.step.factor)
        tpot_s, stay_s = self._strictest_s(slo, ()), self._predictor.stay_s
        wait_s = room.wait_s(tpot_s, room.sequences_after(prompts_s, len(before), stay_s), stay_s)
        return prompts_s + (wait_s or 0.0)

    def ended(self, request_id: str) -> None:
        tpot_s = self._running.pop(request_id, None)
        if tpot_s is not None:
            self._tpots_s[tpot_s] -= 1
            if not self._tpots_s[tpot_s]:
                del self._tpots_s[tpot_s]

    async def place(self, item: Waiting) -> Placed:
        """Wait for its turn and a worker. Cancelling it leaves nothing behind.

        Raises:
            Overloaded: no place in the queue, or the forecast misses its class, or no worker in time.
            DeadlineExceeded: its own.
        """
        now_s = time.monotonic()
        if why := self._queue.refuses(item.tenant):
            self.ledger.turned_away(item.slo, why)
            raise no_place(why)
        placed: Placed | None = None
        try:
            in_turn = self._admit(item, now_s)
            self._serve(now_s, {item: in_turn} if in_turn is not None else {})
            placed = await self._turn(item)
            return placed
        finally:
            self._queue.remove(item)
            if placed is None and item.answer.done() and item.answer.exception() is None:
                item.answer.result().claim.release()  # cancelled in the moment of its turn

    # --- what is foreseen ---

    def _admit(self, item: Waiting, now_s: float) -> Decision | None:
        """Into the queue. Returns the decision behind those that have their turn before it, if one was made.

        Raises Overloaded, with the item in the queue.
        """
        with Plans(self._fleet) as plans:
            plans.add(self._queue)
            decision = item.look()  # behind all that wait, as what is of the same class is
            self._estimate(item, decision)
            others = len(self._queue)
            self._queue.add(item)
            if item.judged or self.mode is Mode.OFF:
                return None if others else decision
            ahead = ahead_of(item, self._queue.order(now_s)) if others else []
            if len(ahead) == others:
                self._judge(item, decision, others, now_s)
                return decision
        with Plans(self._fleet) as plans:
            plans.add(ahead)
            decision = item.look()
            self._note_look(item, decision, now_s)
            self._judge(item, decision, len(ahead), now_s)
        return decision

    def _estimate(self, item: Waiting, decision: Decision) -> None:
        chosen = decision.chosen
        compute_s = self._compute_s(chosen) if chosen is not None else 0.0
        item.due_s = item.received_s + item.slo.ttft_s - compute_s - self._overrun_s(item.slo)
        item.work_s = compute_s
        self._note_look(item, decision, item.queued_s)

    def _overrun_s(self, slo: SloClass) -> float:
        """What is to be left for what comes beside its own computing after its dispatch."""
        return min(self._predictor.overrun_s, slo.ttft_s / 2)

    def _horizon_s(self, member: Member) -> float:
        """A worker with so much to compute is busy until more can have come."""
        return member.load.step_s + self._predictor.transit_s

    def _compute_s(self, chosen: Considered) -> float:
        return self._predictor.prompt.factor * (chosen.fetch_s + chosen.uncached_s)

    def _judge(self, item: Waiting, decision: Decision, ahead: int, now_s: float) -> None:
        """`ahead`: how many have their turn before it, planned for while this runs. Raises Overloaded."""
        if decision.chosen is None:
            return
        verdict = judge(item.slo, self._forecast(item, decision.chosen, ahead, now_s), self.mode)
        item.judged = True
        item.told(verdict)
        self._confidence.decided(verdict.reason is not None)
        self.ledger.decided(item.slo, verdict.reason)
        if verdict.refused and verdict.reason is not None:
            due_s = item.due_s + verdict.ttft_s - item.slo.ttft_s
            self.ledger.turned_away(item.slo, verdict.reason, due_s)
            self._start_pump()
            raise refusal(verdict, item.slo)

    def _forecast(self, item: Waiting, chosen: Considered, ahead: int, now_s: float) -> Forecast:
        member = self._fleet.member(chosen.worker_id)
        assert member is not None
        room = decode_room(self._fleet.in_use(), member, self._predictor.step.factor)
        tpot_s, stay_s = self._strictest_s(item.slo, ()), self._predictor.stay_s
        prompts_s = self._predictor.prompt.factor * member.backlog_s(now_s)
        sequences = room.sequences_after(prompts_s, ahead, stay_s)
        forecast = Forecast(
            waited_s=now_s - item.received_s,
            prompts_s=prompts_s,
            decode_s=prompts_s + wait_s if (wait_s := room.wait_s(tpot_s, sequences, stay_s)) else 0.0,
            compute_s=self._compute_s(chosen),
            tpot_s=room.tpot_s(tpot_s, sequences),
        )
        margin_s = self._predictor.misses.margin_s(forecast, self._confidence.share)
        return replace(forecast, margin_s=min(margin_s, item.slo.ttft_s / 2))

    def _strictest_s(self, slo: SloClass, others: Iterable[SloClass]) -> float:
        """TPOT of those that would share a batch with it. One client's own numbers slow down nobody else further than
        the strictest of the named classes does."""
        return min((slo.tpot_s, *map(_asked_s, others), *self._tpots_s))

    # --- turns ---

    async def _turn(self, item: Waiting) -> Placed:
        while not item.answer.done():
            now_s = time.monotonic()
            until_s = min(item.deadline_s, item.queued_s + self._limits.first_token_s)
            if item.stranded_s is not None:
                until_s = min(until_s, item.stranded_s + self._limits.queue_wait_s)
            if now_s >= until_s:
                raise self._give_up(item, now_s)
            self._start_pump()
            await asyncio.wait((item.answer,), timeout=min(until_s - now_s, self._limits.queue_wait_s))
        return item.answer.result()

    def _give_up(self, item: Waiting, now_s: float) -> Exception:
        if now_s >= item.deadline_s:
            return DeadlineExceeded("The request did not finish in time.")
        reason = "no_worker" if item.stranded_s is not None else "waited"
        self.ledger.turned_away(item.slo, reason)
        why = f"/v1/requests/{item.request_id}/explain says why"
        return Overloaded(f"No worker can take the request now; {why}.", code=reason)

    def _serve(self, now_s: float, known: Mapping[Waiting, Decision]) -> None:
        """Turns, in order, while a worker is free. `known` are decisions that were made just now."""
        workers = self._prompt_workers()
        free = {worker for worker in workers if self._free(worker, now_s)}
        if workers and not free:
            return
        order = self._queue.order(now_s)
        if not workers:
            for item in order:
                item.stranded_s = item.stranded_s if item.stranded_s is not None else now_s
            return
        fresh = dict(known)
        waits: set[SloClass] = set()  # of those that wait before
        rooms: dict[Member | None, DecodeRoom] = {}
        for_prompts = frozenset(workers)
        with Plans(self._fleet) as plans:
            for item in order[:_LOOKS]:
                if not free:
                    return
                try:
                    decision = fresh.pop(item, None) or item.look()
                except Exception as error:  # a policy of one's own: its request fails, and no other
                    self._queue.remove(item)
                    item.answer.set_exception(error)
                    continue
                self._note_look(item, decision, now_s)
                member = self._fleet.member(decision.chosen.worker_id) if decision.chosen is not None else None
                # One that is not for prompts may run this one whole.
                idle = member in free or (
                    member is not None and member not in for_prompts and self._free(member, now_s)
                )
                if member is not None and idle and self._begins(item, member, waits, rooms, now_s):
                    self._begin(item, decision, now_s)
                    fresh.clear()
                    rooms.clear()
                else:
                    waits.add(item.slo)
                    plans.add([item])
                if member in free and not self._free(member, now_s):  # nobody else's load has changed
                    free.discard(member)

    def _begins(
        self, item: Waiting, member: Member, waits: set[SloClass], rooms: dict[Member | None, DecodeRoom], now_s: float
    ) -> bool:
        """Whether, while that can still make it good, a decode batch has room for it. `rooms`: seen in this turn."""
        if self.mode is Mode.OFF or (self.mode is Mode.SHADOW and now_s > item.due_s):
            return True
        batch = None if member.role is Role.PREFILL else member  # all prefill workers hand over to the same ones
        if (room := rooms.get(batch)) is None:
            room = rooms[batch] = decode_room(self._fleet.in_use(), member, self._predictor.step.factor)
        item.wants_decode = not room.has_place(self._strictest_s(item.slo, waits))
        return not item.wants_decode

    def _begin(self, item: Waiting, decision: Decision, now_s: float) -> None:
        self._queue.take(item, now_s)
        self.ended(item.request_id)  # on the worker that it was on before
        self._running[item.request_id] = tpot_s = _asked_s(item.slo)
        self._tpots_s[tpot_s] += 1
        self.wait_seconds.labels(item.slo.name).observe(now_s - item.queued_s)
        item.answer.set_result(item.settle(decision))

    def _note_look(self, item: Waiting, decision: Decision, now_s: float) -> None:
        chosen = decision.chosen
        item.plan = (chosen.worker_id, chosen.uncached_tokens) if chosen is not None else None
        if chosen is not None:
            item.stranded_s = None
        elif item.stranded_s is None:
            item.stranded_s = now_s

    def _prompt_workers(self) -> list[Member]:
        """Those for prompts; while there are none, any is."""
        workers = self._fleet.in_use()
        return [each for each in workers if each.role is not Role.DECODE] or workers

    def _free(self, member: Member, now_s: float) -> bool:
        if member.busy_sequences >= member.hello.max_sequences:
            return False
        return member.backlog_s(now_s) <= self._horizon_s(member)

    # --- the queue's own task, while somebody waits ---

    def _start_pump(self) -> None:
        if self._pump is None or self._pump.done():
            self._pump = asyncio.create_task(self._run(), name="feeder")

    async def _run(self) -> None:
        while len(self._queue) or self.ledger.watching:
            await self._fleet.wait_change(TICK_S)
            now_s = time.monotonic()
            self._serve(now_s, {})
            if self.ledger.watching:
                self.ledger.look(now_s, self._has_room)

    def _has_room(self, slo: SloClass) -> bool:
        """A request of that class would begin at once on a worker that has nothing to compute."""
        now_s, tpot_s = time.monotonic(), self._strictest_s(slo, ())
        idle = [each for each in self._prompt_workers() if each.backlog_s(now_s) == 0.0]
        rooms: list[DecodeRoom] = [
            decode_room(self._fleet.in_use(), each, self._predictor.step.factor) for each in idle[:1]
        ]
        return not len(self._queue) and any(room.has_place(tpot_s) for room in rooms)


def _asked_s(slo: SloClass) -> float:
    """The TPOT that a request asks of those that would share its batch."""
    return max(slo.tpot_s, _STRICTEST_S)
