"""One try at a request: which workers it is on, how far it is, and what can happen to it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from pdserve.protocol import worker_pb2 as pb
from router.placement import Claim


class State(Enum):
    """
    QUEUED ─Submit─> PREFILLING ─HandoffWanted─> HANDOFF_WANTED ─Reserve─> RESERVING ─Reserved, Handoff─> HANDING_OFF
      ^                  │                              ^──────── Refused ────┘                               │
      │                  │ a whole request's                                           decode's first message │
      │                  └──── first token ──────────────────────> DECODING <─────────────────────────────────┘
      │                                                               │ last token
      └── attempt + 1: worker lost, Refused, ERROR, stage deadline    └──> DONE  (also from anywhere: last token, abort)
    """

    QUEUED = "queued"
    PREFILLING = "prefilling"
    HANDOFF_WANTED = "handoff wanted"
    RESERVING = "reserving"
    HANDING_OFF = "handing off"
    DECODING = "decoding"
    DONE = "done"


@dataclass(slots=True, eq=False)
class Attempt:
    """`number` fences it: what comes under another number is dropped, here and on the workers."""

    number: int
    prompt: Claim  # on the worker that computes the prompt
    disaggregated: bool
    decode: Claim | None = None  # from the reservation on

    @property
    def prompt_id(self) -> str:
        return self.prompt.worker_id

    @property
    def decode_id(self) -> str | None:
        return self.decode.worker_id if self.decode is not None else None

    @property
    def worker_ids(self) -> tuple[str, ...]:
        return (self.prompt_id,) if self.decode is None else (self.prompt_id, self.decode.worker_id)

    def release(self) -> None:
        self.prompt.release()
        if self.decode is not None:
            self.decode.release()


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
