"""The queue and what admission decided, read when Prometheus asks."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from router.feeder import Depth, Feeder
from router.slo import CLASSES


class AdmissionCollector(Collector):
    def __init__(self, feeder: Feeder) -> None:
        self._feeder = feeder

    def collect(self) -> Iterable[Metric]:
        ledger = self._feeder.ledger
        yield from self._queue()
        yield from self._feeder.wait_seconds.collect()
        verdicts = CounterMetricFamily(
            "pdserve_admission_verdicts",
            "Requests by SLO class and the objective that the forecast missed; none: it met both. "
            "In shadow mode nothing follows.",
            labels=("slo_class", "reason"),
        )
        for (name, reason), count in sorted(ledger.verdicts.items()):
            verdicts.add_metric((name, reason or "none"), count)
        yield verdicts
        refused = CounterMetricFamily(
            "pdserve_refused_requests",
            "Requests sent away, by SLO class and reason: ttft, tpot, queue_full, tenant_share, no_worker, waited.",
            labels=("slo_class", "reason"),
        )
        for labels, count in sorted(ledger.refused.items()):
            refused.add_metric(labels, count)
        yield refused
        checked = CounterMetricFamily(
            "pdserve_admission_checked",
            "Verdicts checked afterwards: refused or taken, and whether that was right, wrong or unchecked; wrong is a "
            "refused request that could have been served, or one that was taken and was not good.",
            labels=("verdict", "outcome"),
        )
        for labels, count in sorted(ledger.checked.items()):
            checked.add_metric(labels, count)
        yield checked

    def _queue(self) -> Iterable[Metric]:
        what = "by SLO class and by what they wait for: prefill, decode (no batch has room), or any worker."
        labels = ("slo_class", "waits_for")
        requests = GaugeMetricFamily("pdserve_queue_requests", f"Requests in the router's queue, {what}", labels=labels)
        tokens = GaugeMetricFamily("pdserve_queue_tokens", f"Uncached prompt tokens of requests, {what}", labels=labels)
        backlog = self._feeder.backlog()
        for name in CLASSES:  # a queue that is empty says so, else autoscalers find nothing to read
            backlog.setdefault((name, "prefill"), Depth())
            backlog.setdefault((name, "decode"), Depth())
        for key, depth in sorted(backlog.items()):
            requests.add_metric(key, depth.requests)
            tokens.add_metric(key, depth.tokens)
        yield requests
        yield tokens
        wait = GaugeMetricFamily(
            "pdserve_queue_predicted_wait_seconds",
            "How long a short prompt of the SLO class would wait in the router's queue if it came now.",
            labels=("slo_class",),
        )
        for slo in CLASSES.values():
            wait_s = self._feeder.predicted_wait_s(slo)
            if wait_s is not None:
                wait.add_metric((slo.name,), wait_s)
        yield wait
