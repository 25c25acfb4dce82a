"""The one mapping of errors to HTTP: status, headers and OpenAI's error shape.

Adds to the tree of `pdserve.errors` what only an HTTP front can raise:

    ServeError
    ├── ReceiptTimeout   408     the request came too slowly
    └── HeadersTooLarge  431
"""

from __future__ import annotations

import logging
from typing import Any

from pdserve.errors import InternalError, Overloaded, ServeError, Unauthorized

logger = logging.getLogger(__name__)


class ReceiptTimeout(ServeError):
    status = 408
    type = "invalid_request_error"
    code = "request_timeout"


class HeadersTooLarge(ServeError):
    status = 431
    type = "invalid_request_error"
    code = "headers_too_large"


class ClientGone(Exception):
    """The client closed the connection or stopped reading: nobody is left to answer. Never leaves `router.http`."""


def as_serve_error(error: Exception, request_id: str) -> ServeError:
    """`error` itself if it is meant for clients; else it goes to the log and an `InternalError` takes its place."""
    if isinstance(error, ServeError):
        return error
    logger.error("unexpected error request_id=%s", request_id, exc_info=error)
    return InternalError("The server had an error while processing your request.")


def error_payload(error: ServeError) -> dict[str, Any]:
    """The body of an error response."""
    return {"error": {"message": error.message, "type": error.type, "param": error.param, "code": error.code}}


def stream_error_payload(error: ServeError, request_id: str) -> dict[str, Any]:
    """The event that ends a stream which had begun; it carries the request id, as headers can no longer."""
    payload = error_payload(error)
    payload["error"]["request_id"] = request_id
    return payload


def error_headers(error: ServeError) -> dict[str, str]:
    headers = {"retry-after": str(error.retry_after_s)} if isinstance(error, Overloaded) else {}
    if isinstance(error, Unauthorized):
        headers["www-authenticate"] = "Bearer"
    if error.status in (408, 413, 431):  # the rest of the request is not worth reading
        headers["connection"] = "close"
    return headers
