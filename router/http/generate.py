"""The two generating endpoints: receive, prepare, dispatch, deliver, and one way out."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections.abc import Callable
from dataclasses import dataclass

from starlette.types import Receive, Scope, Send

from pdserve.errors import Overloaded, ServeError
from pdserve.request import MAX_SEED
from pdserve.timeline import Timeline
from router.http.call import Call, chat_call, completion_call
from router.http.choices import Choices
from router.http.delivery import Delivery
from router.http.errors import ClientGone, as_serve_error
from router.http.exchange import Exchange
from router.http.responses import ResponsesShape
from router.http.responses_call import responses_call
from router.http.service import ServedModel, Service
from router.http.shapes import ChatShape, CompletionShape, Shape
from router.meter import Meters
from router.metrics import RouterMetrics
from router.wishes import Wishes

# Above this a body takes milliseconds to tokenise, and another thread does it.
INLINE_BODY_BYTES = 8 * 2**10
# The dispatcher ends a request at its deadline; if it should not, this much later the front does.
DEADLINE_GRACE_S = 5.0

logger = logging.getLogger(__name__)


class InFlight:
    """Counts requests inside the front; entering raises Overloaded at the limit."""

    def __init__(self, limit: int, metrics: RouterMetrics) -> None:
        self._limit = limit
        self._count = 0
        metrics.requests_in_flight.set_function(lambda: self._count)

    def __enter__(self) -> None:
        if self._count >= self._limit:
            raise Overloaded("The server is handling as many requests as it can. Please retry.")
        self._count += 1

    def __exit__(self, *exc_info: object) -> None:
        self._count -= 1


@dataclass(frozen=True, slots=True)
class Api:
    """What differs between the endpoints."""

    name: str  # label in metrics and log
    id_prefix: str
    call: Callable[[bytes, ServedModel, int], Call]
    shape: type[Shape]


CHAT = Api("chat_completions", "chatcmpl-", chat_call, ChatShape)
COMPLETIONS = Api("completions", "cmpl-", completion_call, CompletionShape)
RESPONSES = Api("responses", "resp_", responses_call, ResponsesShape)


class GenerateEndpoint:
    """An ASGI application for one path. This is the HTTP edge: every error of a request ends here."""

    def __init__(self, api: Api, service: Service, in_flight: InFlight, meters: Meters) -> None:
        self._api = api
        self._service = service
        self._in_flight = in_flight
        self._meters = meters

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = Exchange(scope, receive, send, self._service.limits, DEADLINE_GRACE_S)
        exchange.extra_headers.append((b"x-request-id", exchange.request_id.encode("ascii")))
        try:
            with self._in_flight:
                async with exchange:
                    outcome = await self._serve(exchange)
        except Exception as error:
            outcome = await self._fail(exchange, error)
            # Of a generation the dispatcher has a line too, the only one when all went well.
            logger.info(
                "request failed client_id=%s endpoint=%s outcome=%s", exchange.request_id, self._api.name, outcome
            )
        self._service.metrics.count_request(self._api.name, outcome)

    async def _fail(self, exchange: Exchange, error: Exception) -> str:
        """Answers with `error` if anyone is there; returns the outcome."""
        if isinstance(error, ClientGone) or (exchange.gone and isinstance(error, ServeError)):
            return "abort"
        failure = as_serve_error(error, exchange.request_id)
        with contextlib.suppress(ClientGone):
            await exchange.fail(failure)
        return str(failure.status)

    async def _serve(self, exchange: Exchange) -> str:
        service = self._service
        timeline = Timeline(received_s=service.clock())
        call = await self._prepare(await exchange.body())
        if call.sampling.grammar is not None:
            await service.check_grammar(call.sampling.grammar, call.grammar_param)
        timeline.tokenised_s = service.clock()
        response_id = self._api.id_prefix + secrets.token_hex(16)
        tenant = exchange.caller.tenant
        wishes = Wishes.from_headers(
            exchange.headers, exchange.caller, label=exchange.request_id, priority=call.priority
        )
        choices = Choices(call, service, response_id, timeline, wishes, tenant)
        shape = self._api.shape(response_id, int(service.wall_clock()), service.model.name, call)
        delivery = Delivery(exchange, call, choices, shape, service.model.tokenizer, service.routing)
        self._meters.begin(tenant, call.prompt_tokens, service.clock())
        exchange.when_gone(choices.stop)
        try:
            await (delivery.stream() if call.stream else delivery.whole())
            await asyncio.sleep(0)  # what was written leaves before it is counted
        finally:
            choices.stop()
            choices.observe(service.metrics)
            self._meters.end(tenant, choices.output_tokens)
        return choices.branches[0].finish_reason or "abort"

    async def _prepare(self, body: bytes) -> Call:
        drawn_seed = secrets.randbelow(MAX_SEED + 1)
        if len(body) <= INLINE_BODY_BYTES:
            return self._api.call(body, self._service.model, drawn_seed)
        return await asyncio.to_thread(self._api.call, body, self._service.model, drawn_seed)
