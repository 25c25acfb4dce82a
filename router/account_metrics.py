"""Goodput and the predictor's error, read when Prometheus asks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from router.slo import GoodputTracker
from router.speed import ErrorMeter


class AccountCollector(Collector):
    def __init__(self, goodput: GoodputTracker, errors: Mapping[str, ErrorMeter]) -> None:
        self._goodput = goodput
        self._errors = errors

    def collect(self) -> Iterable[Metric]:
        outcomes = CounterMetricFamily(
            "pdserve_slo_requests",
            "Requests by SLO class and the stage that broke it; none: TTFT and TPOT both met it.",
            labels=("slo_class", "missed_by"),
        )
        for (name, stage), count in sorted(self._goodput.by_class().items()):
            outcomes.add_metric((name, stage or "none"), count)
        yield outcomes
        tenants = CounterMetricFamily(
            "pdserve_slo_tenant_requests",
            "Requests by tenant (without a tenants' file a digest of the credentials; other: beyond the first 64) and "
            "whether they were good.",
            labels=("tenant", "good"),
        )
        for tenant, stages in sorted(self._goodput.by_tenant.items()):
            tenants.add_metric((tenant, "true"), stages[""])
            tenants.add_metric((tenant, "false"), stages.total() - stages[""])
        yield tenants
        pairs = CounterMetricFamily(
            "pdserve_slo_pair_requests",
            "Requests by the first and the last worker that did a part, and whether they were good.",
            labels=("prefill", "decode", "good"),
        )
        for (prefill, decode, good), count in sorted(self._goodput.by_pair().items()):
            pairs.add_metric((prefill, decode, str(good).lower()), count)
        yield pairs
        error = GaugeMetricFamily(
            "pdserve_prediction_error_ratio",
            "How far predictions were off, as a share of what happened, over the last requests.",
            labels=("what", "percentile"),
        )
        for what, meter in self._errors.items():
            for quantile in (0.5, 0.9):
                share = meter.quantile(quantile)
                if share is not None:
                    error.add_metric((what, f"{quantile:.0%}".rstrip("%")), share)
        yield error
