"""What a worker still has to compute of the prompts that this router sent it, in seconds. Pure: time is passed in.

The rate is what the worker drained while it had something to do: prompts that it computes in one step come out together
and count together. So a worker that gains by batching is seen to drain faster, gets more at a time, and so on until it
gains no more. Steps with hardly a token to compute, of prompts that are all but cached, say nothing about others.
"""

from __future__ import annotations

from router.speed import LEAST_TOKENS
from router.window import Window

_WINDOW = 31
_SAME_STEP_S = 2e-3  # first tokens of one step arrive in one message


class Backlog:
    def __init__(self) -> None:
        self._prompts: dict[int, int] = {}  # uncached tokens by ticket, oldest first
        self._tokens = 0
        self._next_ticket = 0
        self._began_s = 0.0  # the oldest is being computed since then
        self._done_tokens = 0  # in the step that ended last
        self._done_s = -1.0
        self._step_took_s = 0.0
        self._counted = False  # whether that step is the newest of the rates
        self._rates = Window(_WINDOW)
        self._rate: float | None = None

    @property
    def tokens(self) -> int:
        return self._tokens

    def sent(self, tokens: int, now_s: float) -> int:
        """A prompt of so many uncached tokens is on its way; returns its ticket."""
        if not self._prompts:
            self._began_s = now_s
        ticket = self._next_ticket
        self._next_ticket += 1
        self._prompts[ticket] = tokens
        self._tokens += tokens
        return ticket

    def computed(self, ticket: int, now_s: float) -> None:
        """Its first token is there."""
        tokens = self._prompts.get(ticket)
        if tokens is None:
            return
        self._note(tokens, now_s)
        self.dropped(ticket, now_s)

    def dropped(self, ticket: int, now_s: float) -> None:
        """It will not be computed there. Idempotent."""
        if ticket not in self._prompts:
            return
        if ticket == next(iter(self._prompts)):
            self._began_s = now_s  # the next one's turn
        self._tokens -= self._prompts.pop(ticket)

    def seconds(self, now_s: float, usual_rate: float, more_tokens: int = 0) -> float:
        """Until all of it is computed, and `more_tokens` behind it; `usual_rate` (tokens/s) until a rate was measured.

        The oldest counts by what is left of its time; when it takes longer than expected, the others still wait.
        """
        rate = self._rate or usual_rate
        if not self._prompts:
            return more_tokens / rate
        oldest = next(iter(self._prompts.values()))
        left_s = max(0.0, oldest / rate - (now_s - self._began_s))
        return left_s + (self._tokens - oldest + more_tokens) / rate

    def _note(self, tokens: int, now_s: float) -> None:
        if now_s - self._done_s <= _SAME_STEP_S:
            self._done_tokens += tokens
            if self._counted:
                self._rates.drop_newest()
        else:
            self._done_tokens = tokens
            self._step_took_s = now_s - self._began_s
        self._done_s = now_s
        self._counted = self._step_took_s > 0.0 and self._done_tokens >= LEAST_TOKENS
        if self._counted:
            self._rates.add(self._done_tokens / self._step_took_s)
            self._rate = self._rates.median
