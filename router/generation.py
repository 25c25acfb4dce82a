"""A running request as the HTTP layer sees it: an asynchronous iterator of tokens that ends exactly once."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Protocol

from pdserve.request import FinishReason, Request, TokenLogprobs
from pdserve.timeline import Timeline
from router.wishes import NO_WISHES, Wishes


@dataclass(slots=True)  # one a token: freezing it would cost more than making it
class Tokens:
    """What arrived since the last item; `finish_reason` is set on the last item, whose `token_ids` may be empty."""

    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    logprobs: tuple[TokenLogprobs, ...] = ()  # one for each token, if asked for
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()  # with the first token, if asked for: of the second prompt token on


class Generation(Protocol):
    """Tokens are contiguous and exactly the undisturbed run's, whatever worker made them (design invariant I3)."""

    request: Request
    timeline: Timeline
    cached_by_tier: dict[str, int]  # prompt tokens not computed, by where they were; known with the first token

    def __aiter__(self) -> AsyncIterator[Tokens]:
        """Raises a `pdserve.errors.ServeError` if the request fails."""
        ...

    def abort(self) -> None:
        """Stop on all workers and release everything. Idempotent, returns at once; the iterator ends with ABORT."""
        ...

    def finish(self) -> None:
        """As `abort`, of a generation whose answer is complete by a stop string: it ended well, with STOP."""
        ...


class Dispatcher(Protocol):
    """Turns requests into generations. Implemented by `router.dispatch`."""

    def start(self, request: Request, timeline: Timeline, wishes: Wishes = NO_WISHES) -> Generation:
        """Raises `pdserve.errors.Overloaded` when no worker can take the request.

        `request.request_id` is unique among those that run.

        From here on it marks the timeline, and each output token as it arrives from a worker.
        """
        ...
