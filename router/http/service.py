"""What the HTTP front works with, handed to `make_app` in one frozen bundle."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from kvstore.keys import BlockKey
from pdserve.request import Grammar, Request
from router.generation import Dispatcher
from router.http.access import Access
from router.http.trust import Trust
from router.metrics import RouterMetrics
from router.text.chat_template import ChatTemplate
from router.text.tokenizer import Tokenizer
from router.wishes import Wishes

RoleName = Literal["prefill", "decode", "mixed"]


@dataclass(frozen=True, slots=True)
class ServedModel:
    """The model as clients see it."""

    name: str
    tokenizer: Tokenizer
    chat_template: ChatTemplate | None  # None: a base model, which does not chat
    max_model_len: int  # tokens, prompt and output together
    vocab_size: int  # rows of the embedding; token ids that clients send lie below
    eos_token_ids: tuple[int, ...]
    created_s: int  # Unix time shown by /v1/models


@dataclass(frozen=True, slots=True)
class HttpLimits:
    """Bounds on what one client can take. Sizes are checked before anything is built from them."""

    body_bytes: int = 4 * 2**20
    headers_bytes: int = 16 * 2**10
    headers: int = 100
    receipt_s: float = 10.0  # for the whole body to arrive
    write_stall_s: float = 30.0  # one write waiting for a client that does not read
    request_s: float = 600.0  # from receipt to the last token
    in_flight: int = 1024


class Routing(Protocol):
    """What the front asks the brain; every answer is JSON-ready. Implemented by `router.explain`."""

    def explain(self, request_id: str, tenant: str | None) -> dict[str, Any] | None:
        """The record of a request of this tenant (None: of any), by the response's id or the client's own; None when it
        is not among the last."""
        ...

    def recent(self, limit: int, tenant: str | None) -> list[dict[str, Any]]:
        """The records of the last requests of this tenant (None: of all), newest first."""
        ...

    def decision_header(self, request_id: str) -> str | None: ...

    def dry_run(self, request: Request, wishes: Wishes) -> dict[str, Any]:
        """Raises Overloaded or InvalidRequest."""
        ...

    def slo(self) -> dict[str, Any]: ...

    def pairs(self) -> dict[str, Any]: ...


class Operations(Protocol):
    """For operators. Implemented by `router.operations`."""

    async def pools(self) -> dict[str, Any]: ...

    def drain(self, worker_id: str, drained: bool) -> bool:
        """False if no worker has this id."""
        ...

    async def change_role(self, worker_id: str, role: RoleName, *, drain_s: float, force: bool) -> dict[str, Any]:
        """Raises UnknownWorker, Conflict, Overloaded or InvalidRequest."""
        ...


@dataclass(frozen=True, slots=True)
class Service:
    """
    Attributes:
        root_key: of a prompt's block keys, for a salt; raises `Overloaded` while nothing is known of any worker.
        topology: the fleet, JSON-ready; its "ready" is what /readyz asks.
        check_grammar: raises `InvalidRequest` for one that cannot be used, naming the parameter that it came from.
        routing: answers about choices; None leaves their endpoints out.
        operations: likewise, of operators.
        access: who may ask for what.
        clock: monotonic, in seconds; the clock of timelines and deadlines, so the dispatcher's too.
        wall_clock: Unix time in seconds, for `created` only.
    """

    model: ServedModel
    dispatcher: Dispatcher
    root_key: Callable[[bytes], BlockKey]
    metrics: RouterMetrics
    topology: Callable[[], dict[str, Any]]
    check_grammar: Callable[[Grammar, str], Awaitable[None]]
    routing: Routing | None = None
    operations: Operations | None = None
    access: Access = field(default_factory=lambda: Access(Trust()))
    limits: HttpLimits = HttpLimits()
    clock: Callable[[], float] = time.monotonic
    wall_clock: Callable[[], float] = time.time
