"""The replay: arrivals in order, what became of earlier ones between them, and decisions as the router makes them.

Nothing waits for real time, and no worker runs: rates are given. Blocks count as held from the choice on, as the
router's own expectation has it; other routers learn of them when they are computed and reported. The same trace, seed
and setting give the same outcome.
"""

from __future__ import annotations

import heapq
import random
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum

from kvstore.keys import BlockKey
from kvstore.store.rates import PRIORS
from kvstore.store.tier import Tier
from router.columns import Seats
from router.hot_prefixes import HotPrefixes, Target
from router.limits import RouterLimits
from router.policy import Candidate, Need, Phase, Policy, Role
from router.policy.candidates import CONTEXT_TOKENS, SEQUENCES, WAITING_TOKENS
from router.policy.scorers import SEQUENCE_TOKENS
from router.replay.outcome import Ended, Outcome, Work, goodness, quantiles
from router.replay.setting import Arrival, Outage, Setting
from router.replay.view import RouterView
from router.replay.worker import ReplayWorker, Touched


class _Event(Enum):
    PREFILLED = 0
    DECODED = 1
    DIES = 2
    COPIED = 4
    JOINS = 3


@dataclass(slots=True)
class _Running:
    arrival: Arrival
    worker: int
    life: int
    uncached_tokens: int
    router: RouterView
    touched: Touched
    first_token_s: float = 0.0
    stalled_from_s: float = 0.0  # the worker's time for prompts that is accounted for


@dataclass(frozen=True, slots=True)
class _Copied:
    """Blocks that a worker was asked to load."""

    worker: int
    life: int
    keys: tuple[BlockKey, ...]


@dataclass(slots=True)
class Replay:
    """One policy over one list of arrivals, by ascending time. Use once."""

    policy: Policy
    setting: Setting
    _routers: list[RouterView] = field(init=False)
    _heap: list[tuple[float, int, _Event, _Running | Outage | _Copied]] = field(default_factory=list)
    _ended: list[Ended] = field(default_factory=list)
    _queue: dict[int, _Running] = field(default_factory=dict)  # prompts not computed yet, by identity
    _pushed: int = 0
    _failed: int = 0
    _tokens: int = 0
    _hit_tokens: int = 0
    _workers: list[ReplayWorker] = field(init=False)
    _away: set[int] = field(default_factory=set)
    _seats: Seats = field(init=False)
    _work: Work = field(init=False)

    def run(self, trace: Sequence[Arrival]) -> Outcome:
        began_s = time.perf_counter()
        self._prepare(trace[-1].at_s)
        draw = random.Random(self.setting.seed)
        for arrival in trace:
            self._advance(arrival.at_s)
            self._dispatch(arrival, draw.choice(self._routers), arrival.at_s)
        self._advance(float("inf"))
        return self._outcome(trace, time.perf_counter() - began_s)

    def _prepare(self, duration_s: float) -> None:
        setting = self.setting
        blocks = max(1, setting.tokens_per_worker // setting.block_tokens)
        self._workers = [ReplayWorker(blocks, setting.speed) for _ in range(setting.workers)]
        self._work = Work(setting.workers, duration_s)
        limits = RouterLimits()
        self._routers = [
            RouterView(HotPrefixes(limits.hot_copy_bytes, limits.hot_copy_window_s), setting.report_s)
            for _ in range(setting.routers)
        ]
        for router in self._routers:
            for slot in range(setting.workers):
                router.joined(slot, setting.speed)
        for outage in setting.outages:
            self._work.absent(outage.worker, outage.from_s, outage.until_s)
            self._push(outage.from_s, _Event.DIES, outage)
            self._push(outage.until_s, _Event.JOINS, outage)
        self._seat()

    def _seat(self) -> None:
        """Who there is."""
        slots = (slot for slot in range(len(self._workers)) if slot not in self._away)
        self._seats = Seats.of([(slot, self._candidate(slot)) for slot in slots])

    def _candidate(self, slot: int) -> Candidate:
        blocks = self._workers[slot].capacity_blocks
        return Candidate(f"w{slot:05d}", Role.MIXED, True, "", 1 << 31, 1 << 20, max(blocks, 1 << 26), 1)

    # --- what happens ---

    def _push(self, at_s: float, event: _Event, what: _Running | Outage | _Copied) -> None:
        self._pushed += 1  # equal times in the order they were pushed
        heapq.heappush(self._heap, (at_s, self._pushed, event, what))

    def _advance(self, until_s: float) -> None:
        heap = self._heap
        while heap and heap[0][0] <= until_s:
            now_s, _, event, what = heapq.heappop(heap)
            if isinstance(what, Outage):
                self._dies(what.worker, now_s) if event is _Event.DIES else self._joins(what.worker)
            elif isinstance(what, _Copied):
                self._copied(what)
            elif what.life == self._workers[what.worker].life:
                self._prefilled(what, now_s) if event is _Event.PREFILLED else self._decoded(what, now_s)

    def _dispatch(self, arrival: Arrival, router: RouterView, now_s: float) -> None:
        block_tokens = self.setting.block_tokens
        need = Need(Phase.PROMPT, arrival.prompt_tokens, arrival.output_tokens, block_tokens, session=arrival.session)
        router.catch_up(now_s)
        match = router.index.match(arrival.keys)
        candidates = router.columns.candidates(self._seats, match, now_s)
        row = self.policy.decide(need, candidates, router.turn).row
        router.turn += 1
        if row is None:
            self._failed += 1
            return
        slot = int(self._seats.slots[row])
        worker = self._workers[slot]
        if self.setting.token_bytes:
            self._copy_hot(arrival, router, match.by_slot(), now_s)
        touched = worker.touch(arrival.keys)
        router.note_blocks(slot, touched)
        uncached_tokens = max(1, arrival.prompt_tokens - touched.hit_blocks * block_tokens)
        self._tokens += arrival.prompt_tokens
        self._hit_tokens += arrival.prompt_tokens - uncached_tokens
        self._work.note(slot, uncached_tokens, now_s)
        router.note_sent(slot, uncached_tokens, now_s)
        for other in self._routers:
            if other is not router:
                other.hears_sent(slot, uncached_tokens, now_s)
        running = _Running(arrival, slot, worker.life, uncached_tokens, router, touched)
        self._queue[id(running)] = running
        self._push(worker.enqueue(uncached_tokens, now_s), _Event.PREFILLED, running)

    def _change_load(self, running: _Running, row: int, amount: float, now_s: float) -> None:
        running.router.columns.change_load(running.worker, row, amount)
        for router in self._routers:
            if router is not running.router:
                router.reports_load(running.worker, row, amount, now_s)

    def _copy_hot(self, arrival: Arrival, router: RouterView, held: dict[int, int], now_s: float) -> None:
        """As `router.hot_copies` does; what any worker holds, the store holds."""
        setting = self.setting
        most = max(held.values(), default=0)
        tokens = max(1, arrival.prompt_tokens - most * setting.block_tokens) + SEQUENCE_TOKENS
        hot = router.hot.note(arrival.keys, setting.speed.prefill_s(tokens), now_s)
        targets = [
            Target(str(slot), slot, most, max(0.0, self._workers[slot].idle_from_s - now_s))
            for slot in self._seats.slots.tolist()
        ]
        copy = router.hot.choose(hot, held, targets, setting.block_tokens * setting.token_bytes, now_s)
        if copy is not None:
            slot, host = int(copy.worker_id), PRIORS[Tier.HOST]
            copied = _Copied(slot, self._workers[slot].life, arrival.keys[: copy.blocks])
            self._push(now_s + host.latency_s + copy.num_bytes / host.bytes_per_s, _Event.COPIED, copied)

    def _copied(self, copied: _Copied) -> None:
        worker = self._workers[copied.worker]
        if worker.life == copied.life:
            touched = worker.touch(copied.keys)
            for router in self._routers:
                router.note_blocks(copied.worker, touched)

    def _prefilled(self, running: _Running, now_s: float) -> None:
        worker, arrival = self._workers[running.worker], running.arrival
        del self._queue[id(running)]
        if len(self._routers) > 1:  # its own too: an older report may have contradicted what it expected
            for router in self._routers:
                router.reports_blocks(running.worker, running.touched, now_s)
        self._change_load(running, WAITING_TOKENS, -running.uncached_tokens, now_s)
        running.first_token_s = now_s
        running.stalled_from_s = worker.computed_s(now_s)
        if arrival.output_tokens <= 1:
            self._change_load(running, SEQUENCES, -1, now_s)
            self._ended.append(Ended(now_s - arrival.at_s, None))
            return
        worker.decoding += 1
        self._change_load(running, CONTEXT_TOKENS, arrival.prompt_tokens, now_s)
        steps_s = (arrival.output_tokens - 1) * worker.speed.decode_step_s(worker.decoding)
        self._push(now_s + steps_s, _Event.DECODED, running)

    def _decoded(self, running: _Running, now_s: float) -> None:
        """Unless prompts held it up meanwhile: then so much later."""
        worker, arrival = self._workers[running.worker], running.arrival
        computed_s = worker.computed_s(now_s)
        if computed_s - running.stalled_from_s > 1e-6:
            self._push(now_s + computed_s - running.stalled_from_s, _Event.DECODED, running)
            running.stalled_from_s = computed_s
            return
        worker.decoding -= 1
        self._change_load(running, SEQUENCES, -1, now_s)
        self._change_load(running, CONTEXT_TOKENS, -arrival.prompt_tokens, now_s)
        tpot_s = (now_s - running.first_token_s) / (arrival.output_tokens - 1)
        self._ended.append(Ended(running.first_token_s - arrival.at_s, tpot_s))

    def _dies(self, slot: int, now_s: float) -> None:
        """Prompts that it had not computed go to others; what it was decoding is lost."""
        worker = self._workers[slot]
        self._failed += worker.decoding
        worker.die(now_s)
        for router in self._routers:
            router.lost(slot)
        self._away.add(slot)
        self._seat()
        for running in [each for each in self._queue.values() if each.worker == slot]:
            del self._queue[id(running)]
            self._dispatch(running.arrival, running.router, now_s)

    def _joins(self, slot: int) -> None:
        self._away.discard(slot)
        for router in self._routers:
            router.joined(slot, self.setting.speed)
        self._seat()

    def _outcome(self, trace: Sequence[Arrival], took_s: float) -> Outcome:
        duration_s = max(trace[-1].at_s, 1e-9)
        good = goodness(self._ended, self.setting.slo)
        ttft_p50_s, ttft_p99_s = quantiles([each.ttft_s for each in self._ended])
        tpot_p50_s, tpot_p99_s = quantiles([each.tpot_s for each in self._ended if each.tpot_s is not None])
        return Outcome(
            policy=self.policy.name,
            requests=len(trace),
            failed=self._failed,
            copied_bytes=sum(router.hot.copied_bytes for router in self._routers),
            hit_ratio=self._hit_tokens / max(1, self._tokens),
            imbalance=self._work.imbalance(),
            imbalance_60s=self._work.imbalance_60s(),
            ttft_p50_s=ttft_p50_s,
            ttft_p99_s=ttft_p99_s,
            tpot_p50_s=tpot_p50_s,
            tpot_p99_s=tpot_p99_s,
            good_ratio=good / len(trace),
            goodput_rps=good / duration_s,
            replayed_requests_per_s=len(trace) / took_s,
        )


def replay_all(policies: Iterable[Policy], setting: Setting, trace: Sequence[Arrival]) -> list[Outcome]:
    return [Replay(policy, setting).run(trace) for policy in policies]
