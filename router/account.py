"""Settles a request that ended: its record, goodput, and what the prediction missed; teaches the workers' speed."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable

from pdserve.request import FinishReason, Request
from router.demand import DemandMeter
from router.drift import DriftMeter
from router.fleet import Fleet
from router.member import Member
from router.policy.fetches import FETCH_TIERS
from router.predictor import Predictor
from router.records import Record, Records
from router.routed import RoutedGeneration
from router.slo import FAILED, REFUSED, GoodputTracker, SloClass, first_miss, is_lost
from router.wishes import Wishes

_WELL = (FinishReason.STOP.value, FinishReason.LENGTH.value)


class Account:
    def __init__(self, fleet: Fleet, records: Records) -> None:
        self.records = records
        self.goodput = GoodputTracker()
        self.drift = DriftMeter()
        self.store_drift = DriftMeter()  # of what was to come from the store, against what came
        self.prompt_tokens = 0  # of requests that a worker began
        self.cached_tokens: Counter[str] = Counter()  # of those, by the tier they were found in
        self.predictor = Predictor()
        self.demand = DemandMeter()
        self.on_close: Callable[[Record, RoutedGeneration], None] | None = None  # told of each record that is complete
        self._fleet = fleet
        self._open: dict[str, Record] = {}  # bounded by the requests that are active

    def open(self, request: Request, wishes: Wishes) -> Record:
        record = Record(
            request.request_id, wishes.label, len(request.prompt_token_ids), wishes.slo, tenant=wishes.tenant
        )
        self._open[request.request_id] = record
        self.demand.arrived(time.monotonic())
        return self.records.open(record)

    def close(self, generation: RoutedGeneration, end: str) -> bool | None:
        """Whether it was good; None for one that was aborted while it could still have been, which has no objective."""
        record, timeline = self._open.pop(generation.request.request_id), generation.timeline
        record.verdict = generation.verdict
        cached_tokens, now_s = sum(generation.cached_by_tier.values()), time.monotonic()
        uncached_tokens = record.prompt_tokens - cached_tokens
        record.finish(end, timeline, cached_tokens, generation.workers)
        self._learn(record, generation, uncached_tokens)
        if timeline.output_tokens:
            output, slo = timeline.output_tokens, record.slo
            self.demand.ended(
                now_s, uncached_tokens, output, record.prompt_tokens + output // 2, slo.ttft_s, slo.tpot_s
            )
        if timeline.first_token_s is not None:
            self.prompt_tokens += record.prompt_tokens
            for tier, tokens in generation.cached_by_tier.items():
                self.cached_tokens[tier] += tokens
        most_tokens = generation.request.sampling.max_tokens
        judged = end != FinishReason.ABORT.value or is_lost(record.slo, timeline, most_tokens, now_s)
        if judged:
            record.missed = _missed_by(record.slo, generation, end)
            workers = generation.workers or ["-"]
            self.goodput.note(record.slo, (workers[0], workers[-1]), record.missed, record.tenant)
        self.records.closed(record)
        if self.on_close is not None:
            self.on_close(record, generation)
        return record.missed is None if judged else None

    def _learn(self, record: Record, generation: RoutedGeneration, uncached_tokens: int) -> None:
        """Only from requests that one prefill worker began: of others nobody knows whose time it was."""
        timeline, first = generation.timeline, record.first
        if first is None or first.chosen is None or timeline.dispatched_s is None or timeline.first_token_s is None:
            return
        if generation.workers[:1] != [first.chosen.worker_id]:
            return
        member = self._fleet.member(first.chosen.worker_id)
        if member is not None:
            device_tokens = generation.cached_by_tier.get("device", 0)
            blocks = first.chosen.matched_blocks
            self.drift.note(blocks, device_tokens, record.prompt_tokens, member.hello.block_size)
            self._learn_fetch(member, first.chosen.fetched_blocks, generation)
            member.learner.note_prefill(uncached_tokens, timeline.reported.get("compute", 0.0))
        if record.predicted_ttft_s is not None:
            dispatched = self.predictor.errors["ttft_dispatched"]
            dispatched.note(record.predicted_ttft_s, timeline.first_token_s - timeline.dispatched_s)
        # One that was to be refused, but was not, waits behind all others: as nobody foresaw.
        verdict = generation.verdict
        self.predictor.note(verdict.forecast if verdict is not None and verdict.reason is None else None, timeline)

    def _learn_fetch(self, member: Member, foreseen_blocks: int, generation: RoutedGeneration) -> None:
        if not foreseen_blocks and generation.cached_by_tier.keys() <= {"device"}:
            return  # nothing was to come from a store, and nothing did
        block_size = member.hello.block_size
        blocks = {tier: generation.cached_by_tier.get(tier.label, 0) // block_size for tier in FETCH_TIERS}
        prompt_tokens, fetched_tokens = len(generation.request.prompt_token_ids), block_size * sum(blocks.values())
        self.store_drift.note(foreseen_blocks, fetched_tokens, prompt_tokens, block_size)
        tiers = [tier for tier, count in blocks.items() for _ in range(count)]
        member.note_fetch(tiers, generation.timeline.reported.get("fetch", 0.0))


def _missed_by(slo: SloClass, generation: RoutedGeneration, end: str) -> str | None:
    if generation.verdict is not None and generation.verdict.refused:
        return REFUSED
    missed = first_miss(slo, generation.timeline)
    # However soon its tokens came, one that did not come to its end is not good.
    return missed or (None if end in _WELL else FAILED)
