"""The links to peers, read when Prometheus asks: the series of a peer that is no longer listed go with it."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from pdserve.protocol import worker_pb2 as pb


class LinkCollector(Collector):
    def __init__(self, reports: Callable[[], Iterable[pb.LinkReport]]) -> None:
        """`reports`: the latest state of every link that this worker dials."""
        self._reports = reports

    def collect(self) -> Iterable[Metric]:
        up = GaugeMetricFamily("pdserve_link_up", "1 while blocks can be pushed to the peer.", labels=("peer",))
        speed = GaugeMetricFamily(
            "pdserve_link_bandwidth_bytes_per_second",
            "What a probe measured when the link came up.",
            labels=("peer", "transport"),
        )
        for report in self._reports():
            up.add_metric((report.peer_id,), report.up)
            if report.up:
                speed.add_metric((report.peer_id, report.transport), report.bytes_per_second)
        yield up
        yield speed
