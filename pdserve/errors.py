"""Errors that a client can see, each mapped once to HTTP (`router.http.errors`) and to gRPC.

ServeError               status  type                    code
├── InvalidRequest       400     invalid_request_error   names the field in `param`
├── Unauthorized         401     invalid_request_error   invalid_api_key
├── ModelNotFound        404     invalid_request_error   model_not_found
├── UnknownWorker        404     invalid_request_error   unknown_worker
├── Conflict             409     invalid_request_error   the code says with what
├── PayloadTooLarge      413     invalid_request_error   payload_too_large
├── Forbidden            403     permission_error        forbidden
├── Overloaded           503     overloaded_error        `retry_after_s`; the code says what for
│   └── TenantOverQuota  429     rate_limit_error        this client alone is too much
├── WorkerFailed         502     server_error            workers failed and the retry budget is spent
├── DeadlineExceeded     504     server_error            deadline_exceeded
└── InternalError        500     server_error            a bug of ours
"""

from __future__ import annotations


class ServeError(Exception):
    """Base; `message` is one sentence for the client and names no internals."""

    status = 500
    type = "server_error"
    code: str | None = None

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class InvalidRequest(ServeError):
    status = 400
    type = "invalid_request_error"

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message, param=param)
        self.code = code


class ModelNotFound(ServeError):
    status = 404
    type = "invalid_request_error"
    code = "model_not_found"


class UnknownWorker(ServeError):
    status = 404
    type = "invalid_request_error"
    code = "unknown_worker"


class Conflict(ServeError):
    status = 409
    type = "invalid_request_error"

    def __init__(self, message: str, *, code: str) -> None:
        super().__init__(message)
        self.code = code


class PayloadTooLarge(ServeError):
    status = 413
    type = "invalid_request_error"
    code = "payload_too_large"


class Unauthorized(ServeError):
    status = 401
    type = "invalid_request_error"
    code = "invalid_api_key"


class Forbidden(ServeError):
    status = 403
    type = "permission_error"
    code = "forbidden"


class Overloaded(ServeError):
    status = 503
    type = "overloaded_error"
    code = "overloaded"

    def __init__(self, message: str, *, retry_after_s: int = 1, code: str | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
        self.code = code or self.code


class TenantOverQuota(Overloaded):
    status = 429
    type = "rate_limit_error"


class WorkerFailed(ServeError):
    status = 502
    code = "worker_failed"


class DeadlineExceeded(ServeError):
    status = 504
    code = "deadline_exceeded"


class InternalError(ServeError):
    """A bug of ours; the details are in the log under the request id."""


class ConfigError(Exception):
    """A setting, file or model that cannot be used; the message is one sentence that says what to do."""
