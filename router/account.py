"""Settles a request that ended: its record, goodput, and what the prediction missed; teaches the workers' speed."""

from __future__ import annotations

from pdserve.request import FinishReason, Request
from router.drift import DriftMeter
from router.fleet import Fleet
from router.predictor import Predictor
from router.records import Record, Records
from router.routed import RoutedGeneration
from router.slo import REFUSED, GoodputTracker, first_miss
from router.wishes import Wishes


class Account:
    def __init__(self, fleet: Fleet, records: Records) -> None:
        self.records = records
        self.goodput = GoodputTracker()
        self.drift = DriftMeter()
        self.predictor = Predictor()
        self._fleet = fleet
        self._open: dict[str, Record] = {}  # bounded by the requests that are active

    def open(self, request: Request, wishes: Wishes) -> Record:
        record = Record(
            request.request_id, wishes.label, len(request.prompt_token_ids), wishes.slo, tenant=wishes.tenant
        )
        self._open[request.request_id] = record
        return self.records.open(record)

    def close(self, generation: RoutedGeneration, end: str) -> bool | None:
        """Whether it was good; None for one that was aborted, which has no objective."""
        record, timeline = self._open.pop(generation.request.request_id), generation.timeline
        record.verdict = generation.verdict
        record.finish(end, timeline, sum(generation.cached_by_tier.values()), generation.workers)
        self._learn(record, generation)
        if end != FinishReason.ABORT.value:  # a client that left has no objective
            refused = generation.verdict is not None and generation.verdict.refused
            record.missed = REFUSED if refused else first_miss(record.slo, timeline)
            workers = generation.workers or ["-"]
            self.goodput.note(record.slo, (workers[0], workers[-1]), record.missed, record.tenant)
        self.records.closed(record)
        return record.missed is None if end != FinishReason.ABORT.value else None

    def _learn(self, record: Record, generation: RoutedGeneration) -> None:
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
            uncached_tokens = record.prompt_tokens - sum(generation.cached_by_tier.values())
            member.learner.note_prefill(uncached_tokens, timeline.reported.get("compute", 0.0))
        if record.predicted_ttft_s is not None:
            dispatched = self.predictor.errors["ttft_dispatched"]
            dispatched.note(record.predicted_ttft_s, timeline.first_token_s - timeline.dispatched_s)
        # One that was to be refused, but was not, waits behind all others: as nobody foresaw.
        verdict = generation.verdict
        self.predictor.note(verdict.forecast if verdict is not None and verdict.reason is None else None, timeline)
