"""Writes METRICS.md from the code: `make docs`. A test fails when the file is stale."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import ClassVar, cast

from prometheus_client import CollectorRegistry

from kvstore.store.metrics import StoreMetrics
from pdserve import vllm_names
from pdserve.protocol import worker_pb2 as pb
from pdserve.vllm_names import Same
from pdserve.worker.link_metrics import LinkCollector
from pdserve.worker.metrics import WorkerMetrics
from router.account_metrics import AccountCollector
from router.admission_metrics import AdmissionCollector
from router.auto_balance import AutoBalance
from router.balance import Advice
from router.dispatch import RouterDispatcher
from router.drift import DriftMeter
from router.feeder import Depth, Feeder, wait_histogram
from router.fleet import Fleet
from router.fleet_metrics import FleetCollector
from router.hot_copies import HotCopies
from router.limits import LinkLimits
from router.metrics import RouterMetrics
from router.policy import Role
from router.refusals import RefusalLedger
from router.slo import CLASSES, STANDARD, GoodputTracker, SloClass
from router.speed import ErrorMeter
from router.store_watch import StoreWatch

TARGET = Path(__file__).parent.parent / "METRICS.md"
HEAD = """# Metrics

Generated from the code (`make docs`). Base units everywhere. A histogram `x` has the series `x_bucket`, `x_sum` and
`x_count`. A process serves one model in one role, so neither is a label of every series: the chart's PodMonitors add
`model_name` and `component`, and `pdserve_build_info` has the role of now. The series of a worker or link go with it.
"""
VLLM_HEAD = """
## Names of vLLM

The same values under the names that autoscalers, endpoint pickers and dashboards made for vLLM read, with its labels
`model_name` and `engine`; `--no-vllm-names` leaves them out. There is no `vllm:lora_requests_info`, since there are no
adapters. Their colons are all that `promtool check metrics` has to say about a page. Buckets have vLLM's edges, and
some between them.

| name | on | of ours |
|---|---|---|
"""
CONSTANT = ("le", "version", "block_size", "num_blocks", "block_bytes")  # labels that tell no series from another


class IdleWorker:
    worker_id, role, outstanding_tokens = "mixed-0", Role.MIXED, 0

    def backlog_s(self, now_s: float) -> float:
        return 0.0


class OneWorker:
    """What `FleetCollector` asks of a fleet, with one worker in it, so that its labels show."""

    index: tuple[()] = ()
    role_changes: ClassVar[dict[tuple[str, str], int]] = {("prefill", "decode"): 1}
    stores = StoreWatch(LinkLimits())

    def counts(self) -> dict[tuple[str, str], int]:
        return {("mixed", "ready"): 1}

    def in_use(self) -> list[IdleWorker]:
        return [IdleWorker()]


class NoDrift:
    drift = store_drift = DriftMeter()


class OneAdvice:
    """What `FleetCollector` asks of the balance."""

    advice = Advice("prefill-0", Role.PREFILL, Role.DECODE, 1.0, 2.0, 0.0, True)


class OneEvent:
    """What `FleetCollector` asks of a dispatcher."""

    num_active = 0
    hot = HotCopies(cast(Fleet, None), 0, 1.0)
    account = NoDrift()
    draining = False
    counts: ClassVar[dict[str, int]] = {"migrations": 0}
    decisions: ClassVar[dict[tuple[str, str, str], int]] = {("cost", "prompt", "chosen"): 0}


class OneRefusal:
    """What `AdmissionCollector` asks of a feeder."""

    def __init__(self) -> None:
        self.ledger = RefusalLedger()
        self.ledger.decided(CLASSES[STANDARD], None)
        self.ledger.turned_away(CLASSES[STANDARD], "ttft")
        self.ledger.ran(condemned=False, good=True)
        self.wait_seconds = wait_histogram()
        self.wait_seconds.labels(STANDARD)

    def backlog(self) -> dict[tuple[str, str], Depth]:
        return {}

    def predicted_wait_s(self, slo: SloClass) -> float:
        return 0.0


def router_registry() -> CollectorRegistry:
    registry = CollectorRegistry()
    RouterMetrics(registry)
    registry.register(
        FleetCollector(cast(Fleet, OneWorker()), cast(RouterDispatcher, OneEvent()), cast(AutoBalance, OneAdvice()))
    )
    goodput, error = GoodputTracker(), ErrorMeter()
    goodput.note(CLASSES[STANDARD], ("prefill-0", "decode-0"), None)
    error.note(1.0, 1.0)
    registry.register(AccountCollector(goodput, {"ttft": error}))
    registry.register(AdmissionCollector(cast(Feeder, OneRefusal())))
    return registry


def worker_registry() -> CollectorRegistry:
    registry = WorkerMetrics("mixed").registry
    registry.register(LinkCollector(lambda: [pb.LinkReport(peer_id="decode-0", up=True)]))
    return registry


def rows(registry: CollectorRegistry) -> list[str]:
    """One row a metric: name as scraped, type, labels, help."""
    found = []
    collectors = list(registry._collector_to_names)  # the registry has no public way to list its collectors
    for collector in collectors:
        for metric in collector.collect():
            names = getattr(collector, "_labelnames", None) or [n for sample in metric.samples for n in sample.labels]
            labels = ", ".join(f"`{name}`" for name in dict.fromkeys(names) if name not in CONSTANT)
            name = metric.name + {"counter": "_total", "info": "_info"}.get(metric.type, "")
            found.append(f"| `{name}` | {metric.type} | {labels} | {metric.documentation} |")
    return sorted(found)


def vllm_row(where: str, same: Same) -> str:
    only = ", ".join(f'{name}="{" or ".join(values)}"' for name, values in same.labels.items())
    ours = f"`{same.ours}{{{only}}}`" if only else f"`{same.ours}`"
    return f"| `{same.name}` | {where} | {ours} |\n"


def render() -> str:
    parts = [HEAD]
    for title, port, registry in (
        ("Router", "`/metrics` on the HTTP port", router_registry()),
        ("Worker", "`/metrics` on the admin port", worker_registry()),
        ("Store node", "`/metrics` on the admin port", StoreMetrics().registry),
    ):
        parts.append(f"\n## {title}\n\n{port}.\n\n| name | type | labels | meaning |\n|---|---|---|---|\n")
        parts.append("\n".join(rows(registry)) + "\n")
    parts.append(VLLM_HEAD)
    for where, same in (("router", vllm_names.ROUTER), ("worker", vllm_names.WORKER)):
        parts += [vllm_row(where, one) for one in same]
    return "".join(parts)


if __name__ == "__main__":
    if "--check" in sys.argv:
        sys.exit(0 if TARGET.read_text() == render() else "METRICS.md is stale: run make docs")
    TARGET.write_text(render())
