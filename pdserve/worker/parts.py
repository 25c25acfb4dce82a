"""What the two sides of a worker have in common."""

from __future__ import annotations

from dataclasses import dataclass

from pdserve.worker.config import WorkerLimits
from pdserve.worker.engine_thread import EngineThread
from pdserve.worker.links import LinkTable
from pdserve.worker.memory import BlockMemory
from pdserve.worker.metrics import WorkerMetrics
from pdserve.worker.requests import RequestTable
from pdserve.worker.store_side import StoreSide


@dataclass(frozen=True, slots=True)
class Parts:
    """The parts of a worker that its prefill and its decode side both work with."""

    requests: RequestTable
    engine: EngineThread
    links: LinkTable
    memory: BlockMemory
    metrics: WorkerMetrics
    limits: WorkerLimits
    store: StoreSide | None = None  # none: blocks live in the pool alone
