"""Endpoints for operators: how full each pool is with what, and, with the admin key, taking a worker out of use and
changing its role."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from pdserve.errors import InvalidRequest
from router.caller import Caller
from router.http.access import CALLER_KEY
from router.http.body import decode_body
from router.http.errors import error_payload
from router.http.exchange import Exchange
from router.http.json_endpoint import JsonEndpoint
from router.http.schema import Strict, parse
from router.http.service import HttpLimits, Operations, RoleName
from router.roles import DRAIN_S


class RoleBody(Strict):
    role: RoleName
    drain_s: float = DRAIN_S
    force: bool = False


class RoleEndpoint(JsonEndpoint):
    """For operators: another role for a worker. Answers at once; `GET /v1/topology` shows when it has drained."""

    def __init__(self, operations: Operations, limits: HttpLimits) -> None:
        super().__init__(limits)
        self._operations = operations

    async def answer(self, body: bytes, exchange: Exchange) -> dict[str, Any]:
        wanted = parse(RoleBody, decode_body(body))
        worker_id = exchange.path_params["worker_id"]
        return await self._operations.change_role(worker_id, wanted.role, drain_s=wanted.drain_s, force=wanted.force)


def operations_routes(operations: Operations, limits: HttpLimits) -> Sequence[BaseRoute]:
    """GET /v1/pools; GET /admin (what the caller may do); POST and DELETE /admin/workers/{id}/drain; POST
    /admin/workers/{id}/role."""

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
        Route("/admin/workers/{worker_id}/role", RoleEndpoint(operations, limits), methods=["POST"]),
    ]
