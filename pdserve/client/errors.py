"""What a call of a component can fail with.

ComponentError         `code` for programs, `message` one sentence for people
├── NotStarted         no handler has begun: not dialled, draining, no such endpoint, another protocol version
│   ├── NoInstances    nobody is listed, or each one listed was tried
│   └── UnknownInstance
├── CallLost           the connection broke after the request was sent; the handler may have run
├── CallTimeout        the caller's own time is up
└── HandlerFailed      what the handler raised, with its code; `internal` if that was not a HandlerFailed
"""

from __future__ import annotations


class ComponentError(Exception):
    code = "error"

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class NotStarted(ComponentError):
    code = "not_started"


class NoInstances(NotStarted):
    code = "no_instances"


class UnknownInstance(NotStarted):
    code = "unknown_instance"


class CallLost(ComponentError):
    code = "call_lost"


class CallTimeout(ComponentError):
    code = "timeout"


class HandlerFailed(ComponentError):
    """A handler raises it; the caller gets one with the same code and message."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
