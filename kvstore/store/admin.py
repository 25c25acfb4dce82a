"""The node's admin port: health, metrics and the ledger. For operators and probes."""

from __future__ import annotations

import time
from dataclasses import asdict

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from kvstore.store.breaker import BreakerState
from kvstore.store.host_ledger import HostLedger
from kvstore.store.opened import NodeState
from kvstore.store.tier import Tier


def make_admin_app(state: NodeState) -> Starlette:
    """`/livez`, `/readyz`, `/metrics`, `/ledger` (JSON, as `pdserve kv audit` reads it)."""

    async def live(request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def ready(request: Request) -> Response:
        """Ready without a worker too: that the loop answers is the progress. Lost tiers are told, not fatal."""
        return JSONResponse({"status": "ok", "problems": state.problems})

    async def metrics(request: Request) -> Response:
        update_gauges(state)
        return Response(generate_latest(state.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    async def ledger(request: Request) -> Response:
        opened = state.opened
        found = HostLedger(0, 0, 0, 0, 0, 0, ()) if opened is None else opened.store.host.ledger(time.monotonic())
        return JSONResponse(ledger_json(state.config.node_id, found))

    return Starlette(
        routes=[
            Route("/livez", live),
            Route("/readyz", ready),
            Route("/metrics", metrics),
            Route("/ledger", ledger),
        ]
    )


def update_gauges(state: NodeState) -> None:
    """Set the gauges to what is true now."""
    opened, metrics = state.opened, state.metrics
    if opened is None:
        return
    store, block_bytes = opened.store, opened.geometry.block_bytes
    found = store.host.ledger(time.monotonic())
    for name in ("free", "cached", "leased", "writing", "quarantined"):
        metrics.slots.labels(name).set(getattr(found, name))
    _set_tier(state, Tier.HOST, found.cached + found.leased, store.host.num_slots * block_bytes)
    if store.disk is not None:
        _set_tier(state, Tier.DISK, len(store.disk), store.disk.capacity_bytes)
        metrics.breaker_open.labels("disk").set(store.disk.breaker is not BreakerState.CLOSED)
    if opened.peers is not None:
        metrics.breaker_open.labels("index").set(opened.peers.locations.breaker is not BreakerState.CLOSED)
    if store.write_behind is not None:
        metrics.write_behind_bytes.set(store.write_behind.backlog_bytes)


def _set_tier(state: NodeState, tier: Tier, num_blocks: int, capacity_bytes: int) -> None:
    assert state.opened is not None
    state.metrics.blocks.labels(tier.label).set(num_blocks)
    state.metrics.bytes.labels(tier.label).set(num_blocks * state.opened.geometry.block_bytes)
    state.metrics.capacity_bytes.labels(tier.label).set(capacity_bytes)


def ledger_json(node_id: str, ledger: HostLedger) -> dict[str, object]:
    """In the states that a worker's ledger has: slots being read are held, slots being written are receiving."""
    return {
        "worker_id": node_id,
        "total_blocks": ledger.total,
        "by_state": {
            "free": ledger.free,
            "cached": ledger.cached,
            "held": ledger.leased,
            "sending": 0,
            "receiving": ledger.writing,
            "quarantined": ledger.quarantined,
        },
        "holds": [asdict(entry) for entry in ledger.leases],
        "sums": ledger.sums,
        "idle": ledger.idle,
    }
