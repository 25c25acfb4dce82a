"""Endpoints about choices: why a request went where it went, where one would go, and how well objectives are met."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from pdserve.errors import InvalidRequest
from pdserve.request import MAX_SEED, Request
from router.caller import Caller
from router.http.access import CALLER_KEY
from router.http.body import decode_body
from router.http.call import chat_call, completion_call
from router.http.errors import error_payload
from router.http.exchange import Exchange
from router.http.json_endpoint import JsonEndpoint
from router.http.responses_call import responses_call
from router.http.service import Routing, Service
from router.wishes import Wishes

MAX_RECENT = 1024


class DryRunEndpoint(JsonEndpoint):
    """The body and headers of a request, of several prompts the first; answers with the decision, and runs nothing."""

    def __init__(self, service: Service, routing: Routing) -> None:
        super().__init__(service.limits)
        self._service = service
        self._routing = routing

    async def answer(self, body: bytes, exchange: Exchange) -> dict[str, Any]:
        service = self._service
        fields = decode_body(body)
        make = chat_call if "messages" in fields else responses_call if "input" in fields else completion_call
        call = make(body, service.model, secrets.randbelow(MAX_SEED + 1))
        request = Request(
            request_id=exchange.request_id,
            prompt_token_ids=call.prompts[0].token_ids,
            sampling=call.sampling,
            root_key=service.root_key(service.access.cache_salt(exchange.caller.tenant, call.cache_salt)),
            deadline_s=service.clock() + service.limits.request_s,
        )
        return self._routing.dry_run(request, Wishes.from_headers(exchange.headers, exchange.caller))


def _reader(request: HttpRequest) -> str | None:
    """Whose records may be read; None for all."""
    caller: Caller = request.scope[CALLER_KEY]
    return None if caller.operator or not caller.tenant.name else caller.turns


def routing_routes(service: Service, routing: Routing) -> Sequence[BaseRoute]:
    async def explain(request: HttpRequest) -> Response:
        found = routing.explain(request.path_params["request_id"], _reader(request))
        if found is None:
            failure = InvalidRequest(
                "This request is not among the last ones of this router; /v1/requests lists them.",
                code="unknown_request",
            )
            return JSONResponse(error_payload(failure), status_code=404)
        return JSONResponse(found)

    async def recent(request: HttpRequest) -> Response:
        text = request.query_params.get("limit", "50")
        if not (text.isascii() and text.isdigit() and 1 <= int(text[:9]) <= MAX_RECENT):
            raise InvalidRequest(f"'limit' must be a number from 1 to {MAX_RECENT}.", param="limit")
        return JSONResponse({"object": "list", "data": routing.recent(int(text), _reader(request))})

    async def slo(request: HttpRequest) -> Response:
        return JSONResponse(routing.slo())

    async def topology(request: HttpRequest) -> Response:
        return JSONResponse(routing.pairs())

    return [
        Route("/v1/requests", recent),
        Route("/v1/requests/{request_id:path}/explain", explain),  # a client may have a slash in its id
        Route("/v1/route:dryrun", DryRunEndpoint(service, routing), methods=["POST"]),
        Route("/v1/slo", slo),
        Route("/v1/topology", topology),
    ]
