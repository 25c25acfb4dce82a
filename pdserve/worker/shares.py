"""What each router sent to this worker, so that it can be told what the others did: they all choose from the same load.

In the terms in which a router counts its own: prompt tokens that it expects to be computed, until the first token.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from pdserve.worker.requests import RequestTable
from pdserve.worker.session import RouterSession


@dataclass(frozen=True, slots=True)
class Others:
    """Of one session: what came in on all the others."""

    sent_tokens: int = 0  # since it began
    waiting_tokens: int = 0
    sequences: int = 0


class Shares:
    def __init__(self, requests: RequestTable) -> None:
        self._requests = requests
        self._sent_tokens = 0  # by all, ever
        self._not_others: dict[RouterSession, int] = {}  # of those, what was before the session or came in on it

    def opened(self, session: RouterSession) -> None:
        self._not_others[session] = self._sent_tokens

    def closed(self, session: RouterSession) -> None:
        del self._not_others[session]

    def sent(self, session: RouterSession, uncached_tokens: int) -> None:
        """A prompt came in on it."""
        self._sent_tokens += uncached_tokens
        self._not_others[session] += uncached_tokens

    @property
    def several(self) -> bool:
        """More than one router is there."""
        return len(self._not_others) > 1

    def others(self) -> dict[RouterSession, Others]:
        """By session that is open."""
        if not self.several:
            return dict.fromkeys(self._not_others, Others())
        waiting, sequences = Counter[RouterSession](), Counter[RouterSession]()
        for entry in self._requests:
            sequences[entry.session] += 1
            if not entry.tokens_sent:
                waiting[entry.session] += entry.uncached_tokens
        all_waiting, all_sequences = waiting.total(), sequences.total()
        return {
            session: Others(
                self._sent_tokens - not_others, all_waiting - waiting[session], all_sequences - sequences[session]
            )
            for session, not_others in self._not_others.items()
        }
