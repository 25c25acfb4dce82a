"""Endpoints for operators: how full each pool is with what, and, with the admin key, taking a worker out of use."""

from __future__ import annotations

from collections.abc import Sequence

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from pdserve.errors import InvalidRequest
from router.caller import Caller
from router.http.access import CALLER_KEY
from router.http.errors import error_payload
from router.http.service import Operations


def operations_routes(operations: Operations) -> Sequence[BaseRoute]:
    """GET /v1/pools; GET /admin (what the caller may do); POST and DELETE /admin/workers/{id}/drain."""

    async def pools(request: Request) -> Response:
        return JSONResponse(await operations.pools())

    async def admin(request: Request) -> Response:
        """200 to everybody, so that a page can ask."""
        caller: Caller = request.scope[CALLER_KEY]
        return JSONResponse({"trusted": caller.operator})

    async def drain(request: Request) -> Response:
        worker_id, drained = request.path_params["worker_id"], request.method == "POST"
        if not operations.drain(worker_id, drained):
            failure = InvalidRequest(f"No worker is named '{worker_id[:64]}'.", code="unknown_worker")
            return JSONResponse(error_payload(failure), status_code=404)
        return JSONResponse({"worker_id": worker_id, "drained": drained})

    return [
        Route("/v1/pools", pools),
        Route("/admin", admin),
        Route("/admin/workers/{worker_id}/drain", drain, methods=["POST", "DELETE"]),
    ]
