"""The ASGI application: OpenAI's endpoints, models, health and metrics, with a request id on every response."""

from __future__ import annotations

import re
import secrets
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from prometheus_client.exposition import choose_encoder
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pdserve import __version__
from pdserve.errors import Forbidden, InvalidRequest, ModelNotFound, ServeError, Unauthorized
from pdserve.protocol.codec import MAX_GRAMMAR_BYTES, MAX_LOGIT_BIAS, MAX_LOGPROBS
from router.http.access import CALLER_KEY, Access
from router.http.call import MAX_CHOICES
from router.http.console import console_routes
from router.http.conversation import tool_format_of
from router.http.errors import HeadersTooLarge, as_serve_error, error_headers, error_payload
from router.http.exchange import REQUEST_ID_KEY
from router.http.fields import MAX_PROMPTS, MAX_STOP_STRINGS
from router.http.generate import CHAT, COMPLETIONS, RESPONSES, GenerateEndpoint, InFlight
from router.http.openapi import openapi_document
from router.http.operations import operations_routes
from router.http.routing import routing_routes
from router.http.schema import MAX_MESSAGES, MAX_N
from router.http.service import HttpLimits, ServedModel, Service
from router.http.tokens import DetokenizeEndpoint, TokenizeEndpoint
from router.meter import Meters

_REQUEST_ID = re.compile(rb"[\x20-\x7e]{1,128}")


def make_app(service: Service) -> ASGIApp:
    """
    POST /v1/completions, /v1/chat/completions, /v1/responses, /tokenize, /detokenize; GET /v1/models, /v1/models/{id},
    /openapi.json and /docs (its page), /version; GET /livez and /ping (the process runs), /readyz and /health (a worker
    can take requests), /workers (the fleet), /metrics (all in the registry of `service.metrics`); / (the console)
    and /console/{name}; and the endpoints about choices, `router.http.routing`, and for operators,
    `router.http.operations`.
    """
    in_flight, meters = InFlight(service.limits.in_flight, service.metrics), Meters()
    generating = {
        "/v1/completions": GenerateEndpoint(COMPLETIONS, service, in_flight, meters),
        "/v1/chat/completions": GenerateEndpoint(CHAT, service, in_flight, meters),
        "/v1/responses": GenerateEndpoint(RESPONSES, service, in_flight, meters),
    }
    routes = [
        *(Route(path, endpoint, methods=["POST"]) for path, endpoint in generating.items()),
        Route("/tokenize", TokenizeEndpoint(service), methods=["POST"]),
        Route("/detokenize", DetokenizeEndpoint(service), methods=["POST"]),
        *_model_routes(service.model),
        Route("/openapi.json", _openapi(service.model)),
        *_operator_routes(service),
        *(routing_routes(service, service.routing) if service.routing is not None else ()),
        *(operations_routes(service.operations, service.limits) if service.operations is not None else ()),
        *console_routes(),
    ]
    app = Starlette(
        routes=routes,
        exception_handlers={ServeError: _on_error, HTTPException: _on_http_exception, Exception: _on_error},
    )
    return Entrance(app, generating, service.access, service.limits)


class Entrance:
    """Gives each request its id, the client's X-Request-Id if that is printable ASCII, puts it on the response, finds
    out who sent it, and refuses callers who may not and headers beyond the limits.

    Outside Starlette's own handling of errors, so that a 500 has an id too. What generates handles its errors itself,
    puts the id on its responses itself, and is reached past Starlette: no layer has a part in every token.
    """

    def __init__(self, app: ASGIApp, generating: Mapping[str, ASGIApp], access: Access, limits: HttpLimits) -> None:
        self._app = app
        self._generating = generating
        self._access = access
        self._limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = scope["headers"]
        given = next((value for name, value in headers if name == b"x-request-id"), b"")
        request_id = given if _REQUEST_ID.fullmatch(given) else f"req-{secrets.token_hex(16)}".encode()
        scope[REQUEST_ID_KEY] = request_id.decode("ascii")
        app = self._behind(scope)
        if isinstance(app, GenerateEndpoint):
            await app(scope, receive, send)
            return

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"x-request-id", request_id)]
            await send(message)

        await app(scope, receive, send_with_id)

    def _behind(self, scope: Scope) -> ASGIApp:
        """What answers. Nothing behind the entrance runs for a caller that may not ask for it."""
        if not self._acceptable(scope["headers"]):
            return _error_response(HeadersTooLarge("The headers are too large."))
        try:
            scope[CALLER_KEY] = self._access.admit(scope)
        except (Unauthorized, Forbidden) as error:
            return _error_response(error)
        return self._generating.get(scope["path"], self._app) if scope["method"] == "POST" else self._app

    def _acceptable(self, headers: list[tuple[bytes, bytes]]) -> bool:
        size = sum([len(name) + len(value) for name, value in headers])
        return len(headers) <= self._limits.headers and size <= self._limits.headers_bytes


def _model_routes(model: ServedModel) -> list[Route]:
    card = {
        "id": model.name,
        "object": "model",
        "created": model.created_s,
        "owned_by": "pdserve",
        # As vLLM has it; and what a client can ask for.
        "max_model_len": model.max_model_len,
        "capabilities": {
            "completions": True,
            "chat": model.chat_template is not None,
            "tools": model.chat_template is not None and tool_format_of(model.chat_template) is not None,
            "structured_outputs": True,
            "logprobs": True,
        },
        "limits": {
            "context_tokens": model.max_model_len,
            "n": MAX_N,
            "prompts": MAX_PROMPTS,
            "choices": MAX_CHOICES,
            "logprobs": MAX_LOGPROBS,
            "stop_strings": MAX_STOP_STRINGS,
            "logit_bias": MAX_LOGIT_BIAS,
            "messages": MAX_MESSAGES,
            "grammar_bytes": MAX_GRAMMAR_BYTES,
        },
    }

    async def models(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [card]})

    async def one_model(request: Request) -> Response:
        name = request.path_params["name"]
        if name != model.name:
            raise ModelNotFound(f"The model '{name[:64]}' does not exist.", param="model")
        return JSONResponse(card)

    return [Route("/v1/models", models), Route("/v1/models/{name:path}", one_model)]


def _operator_routes(service: Service) -> list[Route]:
    async def livez(request: Request) -> Response:
        return JSONResponse({"status": "alive"})

    async def readyz(request: Request) -> Response:
        topology = service.topology()
        if topology["ready"]:
            return JSONResponse({"status": "ready"})
        shown = service.access.shows_fleet(request.scope[CALLER_KEY])
        why = topology if shown else {"reason": topology["reason"]}
        return JSONResponse({"status": "not ready", **why}, status_code=503, headers={"retry-after": "1"})

    async def version(request: Request) -> Response:
        return JSONResponse({"version": __version__})

    async def workers(request: Request) -> Response:
        return JSONResponse(service.topology())

    async def metrics(request: Request) -> Response:
        encode, media_type = choose_encoder(request.headers.get("accept", ""))  # OpenMetrics has the exemplars
        return Response(encode(service.metrics.registry), media_type=media_type)

    return [
        Route("/livez", livez),
        Route("/ping", livez),
        Route("/readyz", readyz),
        Route("/health", readyz),
        Route("/version", version),
        Route("/workers", workers),
        Route("/metrics", metrics),
    ]


def _openapi(model: ServedModel) -> Callable[[Request], Awaitable[Response]]:
    document = openapi_document(model)

    async def openapi(request: Request) -> Response:
        return JSONResponse(document)

    return openapi


async def _on_error(request: Request, error: Exception) -> Response:
    return _error_response(as_serve_error(error, request.scope[REQUEST_ID_KEY]))


async def _on_http_exception(request: Request, error: Exception) -> Response:
    """No such path, or not this method."""
    assert isinstance(error, HTTPException)
    method, path = request.method, request.url.path[:128]
    headers: dict[str, Any] = dict(error.headers or {})
    takes = f"; it takes {headers['Allow']}" if "Allow" in headers else ""
    failure = InvalidRequest(f"Unknown request URL: {method} {path}{takes}.", code="unknown_url")
    return JSONResponse(error_payload(failure), status_code=error.status_code, headers=headers)


def _error_response(error: ServeError) -> Response:
    return JSONResponse(error_payload(error), status_code=error.status, headers=error_headers(error))
