"""What the fleet and the dispatcher count, read when Prometheus asks."""

from __future__ import annotations

import time
from collections.abc import Iterable

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from router.auto_balance import AutoBalance
from router.dispatch import RouterDispatcher
from router.drift import DriftMeter
from router.fleet import Fleet


class FleetCollector(Collector):
    def __init__(self, fleet: Fleet, dispatcher: RouterDispatcher, balance: AutoBalance) -> None:
        self._fleet = fleet
        self._dispatcher = dispatcher
        self._balance = balance

    def collect(self) -> Iterable[Metric]:
        workers = GaugeMetricFamily("pdserve_router_workers", "Known workers.", labels=("role", "state"))
        for labels, count in sorted(self._fleet.counts().items()):
            workers.add_metric(labels, count)
        yield workers
        changes = CounterMetricFamily(
            "pdserve_router_role_changes", "Workers that took another role.", labels=("from_role", "to_role")
        )
        for labels, count in sorted(self._fleet.role_changes.items()):
            changes.add_metric(labels, count)
        yield changes
        gain = GaugeMetricFamily(
            "pdserve_router_balance_gain_ratio",
            "What another role for one worker is predicted to add to goodput; absent while nothing does.",
            labels=("from_role", "to_role"),
        )
        if (advice := self._balance.advice) is not None:
            gain.add_metric((advice.from_role.value, advice.to_role.value), min(advice.gain, 1e6))
        yield gain
        events = CounterMetricFamily(
            "pdserve_router_events",
            "Retries and causes: rejected_tokens, refusals, redispatches, migrations, handoffs_without_room, spills.",
            labels=("event",),
        )
        for event, count in sorted(self._dispatcher.counts.items()):
            events.add_metric((event,), count)
        yield events
        decisions = CounterMetricFamily(
            "pdserve_router_decisions",
            "Choices of a worker by policy, phase (prompt; whole: for lack of a role it does everything; decode: takes "
            "over; resume: takes over from the store) and outcome (chosen, or nobody could take it).",
            labels=("policy", "phase", "outcome"),
        )
        for choice, count in sorted(self._dispatcher.decisions.items()):
            decisions.add_metric(choice, count)
        yield decisions
        yield GaugeMetricFamily(
            "pdserve_router_draining",
            "1 while this router ends: it takes nothing new.",
            value=self._dispatcher.draining,
        )
        active = self._dispatcher.num_active
        yield GaugeMetricFamily("pdserve_router_active_requests", "Requests that workers have.", value=active)
        yield from self._backlogs()
        yield from self._drift()
        hot = self._dispatcher.hot.prefixes
        yield CounterMetricFamily(
            "pdserve_router_hot_copies", "Copies of hot prefixes that workers were asked to load.", value=hot.copies
        )
        yield CounterMetricFamily(
            "pdserve_router_hot_copied_bytes", "Bytes of these copies, at most.", value=hot.copied_bytes
        )
        yield GaugeMetricFamily(
            "pdserve_router_index_keys", "Block keys in the prefix index.", value=len(self._fleet.index)
        )
        stores = self._fleet.stores
        yield GaugeMetricFamily(
            "pdserve_router_store_index_keys", "Blocks of store nodes in the index.", value=len(stores.index)
        )
        yield CounterMetricFamily(
            "pdserve_router_store_index_dropped_keys",
            "Blocks of store nodes that found no room in the index.",
            value=stores.index.dropped_keys,
        )
        yield CounterMetricFamily(
            "pdserve_router_store_resyncs", "Subscriptions to a store node's events that ended.", value=stores.resyncs
        )

    def _backlogs(self) -> Iterable[Metric]:
        """Of workers that are in use: the series of one that goes, goes with it."""
        labels = ("worker", "role")
        tokens = GaugeMetricFamily(
            "pdserve_router_backlog_tokens",
            "Uncached prompt tokens that this router sent to the worker and that it has not computed.",
            labels=labels,
        )
        seconds = GaugeMetricFamily(
            "pdserve_router_backlog_seconds", "Until the worker has computed its prompts, as predicted.", labels=labels
        )
        now_s = time.monotonic()
        for member in sorted(self._fleet.in_use(), key=lambda each: each.worker_id):
            tokens.add_metric((member.worker_id, member.role.value), member.outstanding_tokens)
            seconds.add_metric((member.worker_id, member.role.value), member.backlog_s(now_s))
        yield tokens
        yield seconds

    def _drift(self) -> Iterable[Metric]:
        account = self._dispatcher.account
        yield _drift_of(
            account.drift,
            "pdserve_router_index_blocks",
            "Leading blocks on chosen workers: predicted by the index, found there, false_hit (predicted, not found), "
            "false_miss (found, not predicted).",
        )
        yield _drift_of(
            account.store_drift,
            "pdserve_router_fetched_blocks",
            "As pdserve_router_index_blocks, of blocks that chosen workers brought from the store.",
        )


def _drift_of(drift: DriftMeter, name: str, text: str) -> Metric:
    blocks = CounterMetricFamily(name, text, labels=("what",))
    for what, count in (
        ("predicted", drift.predicted_blocks),
        ("found", drift.found_blocks),
        ("false_hit", drift.false_hit_blocks),
        ("false_miss", drift.false_miss_blocks),
    ):
        blocks.add_metric((what,), count)
    return blocks
