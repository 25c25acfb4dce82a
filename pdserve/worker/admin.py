"""The worker's admin port: health, metrics and the ledger. For operators and probes, never for clients."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Protocol

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from kvstore.pool import Ledger
from pdserve.worker.config import WorkerLimits


class Administered(Protocol):
    """What the admin port shows."""

    worker_id: str

    @property
    def registry(self) -> CollectorRegistry: ...

    def stalled_s(self, now_s: float) -> float: ...

    async def ledger(self) -> Ledger: ...


def make_admin_app(worker: Administered, limits: WorkerLimits) -> Starlette:
    """`/livez`, `/readyz` (503 while a step hangs), `/metrics`, `/ledger` (JSON; what `pdserve kv audit` reads)."""

    async def live(request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def ready(request: Request) -> Response:
        stalled_s = worker.stalled_s(time.monotonic())
        if stalled_s > limits.stalled_s:
            return JSONResponse({"status": "stalled", "step_s": round(stalled_s, 1)}, status_code=503)
        return JSONResponse({"status": "ok"})

    async def metrics(request: Request) -> Response:
        return Response(generate_latest(worker.registry), media_type=CONTENT_TYPE_LATEST)

    async def ledger(request: Request) -> Response:
        try:
            found = await worker.ledger()
        except TimeoutError:
            return JSONResponse({"error": "the engine did not answer in time"}, status_code=503)
        return JSONResponse(ledger_json(worker.worker_id, found))

    return Starlette(
        routes=[
            Route("/livez", live),
            Route("/readyz", ready),
            Route("/metrics", metrics),
            Route("/ledger", ledger),
        ]
    )


def ledger_json(worker_id: str, ledger: Ledger) -> dict[str, object]:
    states = ("free", "cached", "held", "sending", "receiving", "quarantined")
    return {
        "worker_id": worker_id,
        "total_blocks": ledger.total,
        "by_state": {state: getattr(ledger, state) for state in states},
        "holds": [asdict(entry) for entry in ledger.holds],
        "sums": ledger.sums,
        "idle": ledger.idle,
    }
