"""Endpoints for operators: how full each pool is with what, and, with the admin key, taking a worker out of use."""

from __future__ import annotations

from collections.abc import Sequence
from urllib.parse import urlsplit

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from pdserve.errors import Forbidden, InvalidRequest
from router.http.errors import error_payload
from router.http.service import Operations, Service


def operations_routes(service: Service, operations: Operations) -> Sequence[BaseRoute]:
    """GET /v1/pools; GET /admin (what the caller may do); POST and DELETE /admin/workers/{id}/drain."""

    def trusted(request: Request) -> bool:
        host = request.client.host if request.client is not None else None
        return service.trust.covers(host, dict(request.scope["headers"])) and _same_origin(request)

    async def pools(request: Request) -> Response:
        return JSONResponse(await operations.pools())

    async def admin(request: Request) -> Response:
        """200 to everybody, so that a page can ask."""
        return JSONResponse({"trusted": trusted(request)})

    async def drain(request: Request) -> Response:
        if not trusted(request):
            raise Forbidden(
                "This needs the admin key in x-pdserve-admin-key or, where none is set, a caller on this machine."
            )
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


def _same_origin(request: Request) -> bool:
    """Browsers name the page that asks. One of another origin has no business here, even on the operator's machine."""
    origin = request.headers.get("origin")
    return origin is None or urlsplit(origin).netloc == request.headers.get("host")
