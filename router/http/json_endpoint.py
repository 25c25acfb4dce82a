"""An endpoint that answers a JSON body with one JSON object, within the limits of every request."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from typing import Any

from starlette.types import Receive, Scope, Send

from router.http.errors import ClientGone, as_serve_error
from router.http.exchange import Exchange
from router.http.service import HttpLimits


class JsonEndpoint(ABC):
    """An ASGI application for one path."""

    def __init__(self, limits: HttpLimits) -> None:
        self._limits = limits

    @abstractmethod
    async def answer(self, body: bytes, exchange: Exchange) -> dict[str, Any]:
        """Raises a ServeError."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = Exchange(scope, receive, send, self._limits)
        with contextlib.suppress(ClientGone):
            try:
                async with exchange:
                    await exchange.respond(200, await self.answer(await exchange.body(), exchange))
            except ClientGone:
                raise
            except Exception as error:
                await exchange.fail(as_serve_error(error, exchange.request_id))
