"""One try at a request: which workers it is on, how far it is, and what has happened to it that waits to be handled."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections import deque
from dataclasses import dataclass
from enum import Enum

from pdserve.errors import DeadlineExceeded
from pdserve.protocol import worker_pb2 as pb
from router.limits import RouterLimits
from router.placement import Claim


class State(Enum):
    """
    PREFILLING ─HandoffWanted─> HANDOFF_WANTED ─Reserve─> RESERVING ─Reserved: Handoff─> HANDING_OFF ─┐
        │                             ^────── refused ────────┘                                       │ decode's
        │ first token of a request                                                                    │ first token
        └ that is not disaggregated ──────────────────────────────────────────────────> DECODING <────┘

    Before the first attempt, and between two, the request is QUEUED. It is DONE with its last token, with its client's
    abort, or with an error. An attempt fails when a worker is lost, refuses or reports an error, or a stage passes its
    deadline.
    """

    PREFILLING = "prefilling"
    HANDOFF_WANTED = "handoff wanted"
    RESERVING = "reserving"
    HANDING_OFF = "handing off"
    DECODING = "decoding"


@dataclass(frozen=True, slots=True)
class HandoffWanted:
    pass


@dataclass(frozen=True, slots=True)
class Reserved:
    worker_id: str
    ticket: pb.Ticket


@dataclass(frozen=True, slots=True)
class DecodeBegan:
    pass


@dataclass(frozen=True, slots=True)
class Failed:
    """A worker cannot do its part: lost, refused, or in error."""

    worker_id: str
    reason: str
    refused: bool = False


Event = HandoffWanted | Reserved | DecodeBegan | Failed


class AttemptFailed(Exception):
    """The attempt is over, the request is not. `worker_id` is to be avoided next."""

    def __init__(self, worker_id: str, reason: str, *, refused: bool = False, stalled: bool = False) -> None:
        super().__init__(reason)
        self.worker_id = worker_id
        self.refused = refused  # nothing was begun, so it costs no retry
        self.stalled = stalled


class Attempt:
    """`number` fences it: what comes under another number is dropped, here and on the workers."""

    def __init__(
        self,
        number: int,
        prompt: Claim,
        *,
        resumed_tokens: int,
        disaggregated: bool,
        deadline_s: float,
        limits: RouterLimits,
    ) -> None:
        self.number = number
        self.prompt = prompt  # the worker that computes the prompt
        self.decode: Claim | None = None  # from the reservation on
        self.resumed_tokens = resumed_tokens  # output tokens of the attempts before
        self.disaggregated = disaggregated
        self.state = State.PREFILLING
        self.progress_s = time.monotonic()  # submitted, or the last token
        self._deadline_s = deadline_s  # of the request
        self._limits = limits
        self._events: deque[Event] = deque()
        self._wake = asyncio.Event()

    @property
    def prompt_id(self) -> str:
        return self.prompt.worker_id

    @property
    def decode_id(self) -> str | None:
        return self.decode.worker_id if self.decode is not None else None

    @property
    def worker_ids(self) -> tuple[str, ...]:
        return (self.prompt_id,) if self.decode is None else (self.prompt_id, self.decode.worker_id)

    def is_on(self, worker_id: str) -> bool:
        return worker_id == self.prompt.worker_id or (self.decode is not None and worker_id == self.decode.worker_id)

    def decode_began(self) -> None:
        """Decode's first message after the hand-over: prefill's part is over."""
        self.state = State.DECODING
        self.progress_s = time.monotonic()
        self.prompt.release()
        self.post(DecodeBegan())

    def release(self) -> None:
        self.prompt.release()
        if self.decode is not None:
            self.decode.release()

    def post(self, event: Event) -> None:
        self._events.append(event)
        self._wake.set()

    async def event(self, until_s: float = math.inf) -> Event | None:
        """The next event, or None at `until_s`.

        Raises:
            AttemptFailed: a worker failed, other than one that was only asked for a reservation, or made no progress.
            DeadlineExceeded: the request's own deadline.
        """
        while True:
            if self._events:
                event = self._events.popleft()
                if isinstance(event, Failed) and not self._may_fail(event):
                    raise AttemptFailed(event.worker_id, event.reason, refused=event.refused)
                return event
            now_s, stalled_s = time.monotonic(), self._stalled_at_s()
            if now_s >= self._deadline_s:
                raise DeadlineExceeded("The request did not finish in time.")
            if now_s >= until_s:
                return None
            if now_s >= stalled_s:
                raise AttemptFailed(self.worker_ids[-1], f"stalled while {self.state.value}", stalled=True)
            self._wake.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(until_s, stalled_s, self._deadline_s) - now_s):
                    await self._wake.wait()

    def _may_fail(self, failed: Failed) -> bool:
        """A reservation may be refused, and a late word from a worker that was asked before changes nothing."""
        asked_only = self.state is State.RESERVING and failed.worker_id == self.decode_id
        return asked_only or not self.is_on(failed.worker_id)

    def _stalled_at_s(self) -> float:
        """When the lack of tokens becomes a failure. The steps of a hand-over have deadlines of their own."""
        if self.state is State.PREFILLING:
            return self.progress_s + self._limits.first_token_s
        if self.state is State.DECODING:
            return self.progress_s + self._limits.inter_token_s
        return math.inf
