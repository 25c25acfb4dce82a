"""The queue and what admission decided, read when Prometheus asks."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from router.feeder import Feeder


class AdmissionCollector(Collector):
    def __init__(self, feeder: Feeder) -> None:
        self._feeder = feeder

    def collect(self) -> Iterable[Metric]:
        ledger = self._feeder.ledger
        depth = GaugeMetricFamily("pdserve_queue_requests", "Requests in the router's queue.", labels=("slo_class",))
        for name, count in sorted(self._feeder.depths().items()):
            depth.add_metric((name,), count)
        yield depth
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
