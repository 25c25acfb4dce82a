"""The two generating endpoints: receive, prepare, dispatch, deliver, and one way out."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from starlette.types import Receive, Scope, Send

from pdserve.errors import DeadlineExceeded, InternalError, Overloaded, ServeError
from pdserve.request import MAX_SEED, Request
from pdserve.timeline import Timeline
from router.generation import Generation
from router.http.answer import Answer
from router.http.call import Call, chat_call, completion_call
from router.http.errors import ClientGone, as_serve_error
from router.http.exchange import DONE, Exchange, sse_event
from router.http.service import Routing, ServedModel, Service
from router.http.shapes import ChatShape, CompletionShape, Payload, Shape, Usage
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
        self._gauge = metrics.requests_in_flight

    def __enter__(self) -> None:
        if self._count >= self._limit:
            raise Overloaded("The server is handling as many requests as it can. Please retry.")
        self._count += 1
        self._gauge.set(self._count)

    def __exit__(self, *exc_info: object) -> None:
        self._count -= 1
        self._gauge.set(self._count)


@dataclass(frozen=True, slots=True)
class Api:
    """What differs between the endpoints."""

    name: str  # label in metrics and log
    id_prefix: str
    call: Callable[[bytes, ServedModel, int], Call]
    shape: type[Shape]


CHAT = Api("chat_completions", "chatcmpl-", chat_call, ChatShape)
COMPLETIONS = Api("completions", "cmpl-", completion_call, CompletionShape)


class GenerateEndpoint:
    """An ASGI application for one path. This is the HTTP edge: every error of a request ends here."""

    def __init__(self, api: Api, service: Service, in_flight: InFlight) -> None:
        self._api = api
        self._service = service
        self._in_flight = in_flight

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = Exchange(scope, receive, send, self._service.limits)
        try:
            with self._in_flight:
                outcome = await self._serve(exchange)
        except Exception as error:
            outcome = await self._fail(exchange, error)
        self._service.metrics.count_request(self._api.name, outcome)
        logger.info("request ended request_id=%s endpoint=%s outcome=%s", exchange.request_id, self._api.name, outcome)

    async def _fail(self, exchange: Exchange, error: Exception) -> str:
        """Answers with `error` if anyone is there; returns the outcome."""
        if isinstance(error, ClientGone) or (exchange.gone and isinstance(error, ServeError)):
            return "abort"
        failure = as_serve_error(error, exchange.request_id)
        with contextlib.suppress(ClientGone):
            await exchange.fail(failure)
        return str(failure.status)

    async def _serve(self, exchange: Exchange) -> str:
        service, limits = self._service, self._service.limits
        timeline = Timeline(received_s=service.clock())
        body = await exchange.body()
        call = await self._prepare(body)
        timeline.tokenised_s = service.clock()
        # Clients choose X-Request-Id and may repeat it; inside, an id must be unique.
        response_id = self._api.id_prefix + secrets.token_hex(16)
        request = Request(
            request_id=response_id,
            prompt_token_ids=call.prompt_token_ids,
            sampling=call.sampling,
            root_key=service.root_key(),
            deadline_s=timeline.received_s + limits.request_s,
        )
        wishes = Wishes.from_headers(exchange.headers, label=exchange.request_id)
        generation = service.dispatcher.start(request, timeline, wishes)
        logger.info("request started request_id=%s id=%s", exchange.request_id, response_id)
        answer = Answer(call, service.model.tokenizer.token_bytes, service.clock)
        delivery = _Delivery(
            exchange, generation, answer, self._shape(call, response_id), call.include_usage, service.routing
        )
        watcher = asyncio.create_task(_abort_when_gone(exchange, generation))
        try:
            async with asyncio.timeout(limits.request_s + DEADLINE_GRACE_S):
                await (delivery.stream() if call.stream else delivery.whole())
        except TimeoutError as error:
            raise DeadlineExceeded("The request took too long.") from error
        finally:
            watcher.cancel()
            generation.abort()  # of no effect on one that has ended
            service.metrics.observe_generation(
                timeline,
                prompt_tokens=len(call.prompt_token_ids),
                cached_by_tier=generation.cached_by_tier,
                gaps_s=answer.gaps_s,
            )
        return answer.finish_reason.value if answer.finish_reason is not None else "abort"

    async def _prepare(self, body: bytes) -> Call:
        drawn_seed = secrets.randbelow(MAX_SEED + 1)
        if len(body) <= INLINE_BODY_BYTES:
            return self._api.call(body, self._service.model, drawn_seed)
        return await asyncio.to_thread(self._api.call, body, self._service.model, drawn_seed)

    def _shape(self, call: Call, response_id: str) -> Shape:
        created_s = int(self._service.wall_clock())
        return self._api.shape(response_id, created_s, self._service.model.name, call.include_usage)


async def _abort_when_gone(exchange: Exchange, generation: Generation) -> None:
    await exchange.disconnected()
    generation.abort()


@dataclass(frozen=True, slots=True)
class _Delivery:
    """The loop from tokens to bytes. A write that waits for a slow client lets tokens gather in the generation, and
    they leave in one chunk; nothing is buffered here."""

    exchange: Exchange
    generation: Generation
    answer: Answer
    shape: Shape
    include_usage: bool
    routing: Routing | None

    def _name_decision(self) -> None:
        """On the response's headers, once tokens are there: then it is made."""
        if self.routing is None or self.exchange.extra_headers:
            return
        header = self.routing.decision_header(self.generation.request.request_id)
        if header is not None:
            self.exchange.extra_headers.append((b"x-pdserve-decision", header.encode("latin-1", "replace")))

    async def whole(self) -> None:
        pieces: list[str] = []
        async for tokens in self.generation:
            pieces.append(self.answer.push(tokens))
            if self.answer.finish_reason is not None:
                self._name_decision()
                payload = self.shape.whole("".join(pieces), self.answer.finish_reason, self._usage())
                await self.exchange.respond(200, payload | self._timeline_extension())
                return
        raise InternalError("The generation ended without a reason.")

    async def stream(self) -> None:
        """Nothing is sent before the first tokens are there, so an earlier failure still gets its own status."""
        opening = b"".join(map(sse_event, self.shape.opening()))
        async for tokens in self.generation:
            text = self.answer.push(tokens)
            data = opening + sse_event(self.shape.delta(text)) if text else opening
            self._name_decision()
            opening = b""
            if self.answer.finish_reason is not None:
                await self.exchange.write(data + self._ending(), last=True)
                return
            if data:
                await self.exchange.write(data)
        raise InternalError("The generation ended without a reason.")

    def _ending(self) -> bytes:
        assert self.answer.finish_reason is not None
        data = sse_event(self.shape.end(self.answer.finish_reason))
        if self.include_usage:
            data += sse_event(self.shape.usage(self._usage()) | self._timeline_extension())
        return data + DONE

    def _usage(self) -> Usage:
        return Usage(
            prompt_tokens=len(self.generation.request.prompt_token_ids),
            completion_tokens=self.answer.output_tokens,
            cached_tokens=sum(self.generation.cached_by_tier.values()),
        )

    def _timeline_extension(self) -> Payload:
        """Where the time went, for who asks with the header `x-pdserve-timeline: 1`."""
        if self.exchange.headers.get(b"x-pdserve-timeline") != b"1":
            return {}
        timeline = self.generation.timeline
        extension: dict[str, Any] = {
            "request_id": self.exchange.request_id,
            "ttft_s": timeline.ttft_s,
            "tpot_s": timeline.tpot_s,
            "stages": timeline.ttft_stages(),
            "handoff": timeline.handoff_stages(),
            "cached_tokens": dict(self.generation.cached_by_tier),
        }
        return {"x_pdserve": extension}
