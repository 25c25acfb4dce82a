"""The requests of this worker: one entry each, from `Submit` or `Reserve` to its end, which is one path.

`end` first stops whatever moves blocks in or out, then the engine gives the blocks back. A push reads the blocks, so
they stay held until it has drained; an arrival is written by a peer, so its blocks go into quarantine at once and leave
it one by one as the transfer plane proves each of them drained.
"""

from __future__ import annotations

import asyncio
import time
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from kvstore.keys import BlockKey
from kvstore.store.tier import Tier
from pdserve.engine.grammar import TokenGrammar
from pdserve.engine.sequence import Sequence
from pdserve.errors import InvalidRequest
from pdserve.grammars import Grammars
from pdserve.protocol import codec
from pdserve.protocol import worker_pb2 as pb
from pdserve.worker.arrival import Arrival
from pdserve.worker.engine_thread import EngineThread
from pdserve.worker.push import Push, TicketId
from pdserve.worker.session import RouterSession


@dataclass(slots=True, eq=False)
class Entry:
    """One attempt of a request on this worker; times on the local monotonic clock."""

    request_id: str
    attempt: int
    session: RouterSession
    sequence: Sequence
    received_s: float
    deadline_s: float
    times: pb.StageTimes | None = None  # of a phase that is over, to be told with the next token
    push: Push | None = None
    ticket_id: TicketId | None = None  # that the push is under
    arrival: Arrival | None = None
    tokens_sent: int = 0
    uncached_tokens: int = 0  # of a prompt, that its router expects to be computed here
    fetch_s: float = 0.0  # spent with the store before it was queued
    fetched: tuple[Tier, ...] = ()  # where its blocks came from that were not in the pool

    @property
    def name(self) -> str:
        return self.sequence.name

    def cached_by_tier(self) -> dict[str, int]:
        """Prompt tokens that were not computed, by where they were found; sums to `sequence.cached_tokens`."""
        left = self.sequence.cached_tokens
        tokens = Counter[str]()
        # What was fetched follows what was here; some of it may have been evicted again before the prompt was admitted.
        here = max(0, left - len(self.fetched) * self.sequence.block_size)
        for label in ("device", *(tier.label for tier in self.fetched)):
            found = here if label == "device" else min(self.sequence.block_size, left)
            tokens[label] += found
            left -= found
        return {label: count for label, count in tokens.items() if count}


def entry_name(request_id: str, attempt: int) -> str:
    return f"{request_id}#{attempt}"


class RequestTable:
    """Use on the asyncio loop only."""

    def __init__(
        self, engine: EngineThread, grammars: Grammars, *, block_size: int, vocab_size: int, max_model_len: int
    ) -> None:
        self._engine = engine
        self._grammars = grammars
        self._block_size = block_size
        self.vocab_size = vocab_size
        self._max_model_len = max_model_len
        self._entries: dict[str, Entry] = {}
        self._draining: dict[str, asyncio.Future[None]] = {}  # ended, but their blocks are still being read

    def __iter__(self) -> Iterator[Entry]:
        return iter(list(self._entries.values()))

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def idle(self) -> bool:
        """Nothing runs, and nothing that has ended is still being read."""
        return not self._entries and not self._draining

    def get(self, name: str) -> Entry | None:
        return self._entries.get(name)

    def open(self, session: RouterSession, submit: pb.Submit, *, prefill_only: bool) -> Entry | None:
        """A new entry, or None: what cannot be run is answered with an error, what is here already is ignored."""
        name = entry_name(submit.request_id, submit.attempt)
        if name in self._entries or name in self._draining:
            return None
        try:
            codec.check_submit(submit, vocab_size=self.vocab_size, max_model_len=self._max_model_len)
            sampling = codec.sampling_from_proto(submit.sampling, self.vocab_size)
        except InvalidRequest as error:
            self._send_end(session, submit.request_id, submit.attempt, pb.ERROR, error.message)
            return None
        now_s = time.monotonic()
        sequence = Sequence(
            name=name,
            token_ids=array("I", [*submit.prompt_token_ids, *submit.output_token_ids]),
            num_prompt_tokens=len(submit.prompt_token_ids),
            sampling=sampling,
            root_key=BlockKey(submit.root_key),
            tenant=submit.tenant,
            block_size=self._block_size,
            arrived_s=now_s,
            prefill_only=prefill_only,
            grammar=TokenGrammar(self._grammars.submit(sampling.grammar)) if sampling.grammar is not None else None,
        )
        entry = Entry(submit.request_id, submit.attempt, session, sequence, now_s, now_s + submit.remaining_s)
        self._entries[name] = entry
        return entry

    def refuse(self, entry: Entry, reason: str) -> None:
        """Not now: the router may try elsewhere."""
        if self.get(entry.name) is entry:
            self.turn_away(entry.session, entry.request_id, entry.attempt, reason)
            self.end(entry)

    @staticmethod
    def turn_away(session: RouterSession, request_id: str, attempt: int, reason: str) -> None:
        """Not now, before there is an entry."""
        refused = pb.Refused(request_id=request_id, attempt=attempt, reason=reason)
        session.send(pb.WorkerMessage(refused=refused))

    def fail(self, entry: Entry, error: str) -> None:
        """This attempt cannot go on."""
        if self.get(entry.name) is entry:
            self._send_end(entry.session, entry.request_id, entry.attempt, pb.ERROR, error)
            self.end(entry)

    def end(self, entry: Entry) -> None:
        """The one exit. Idempotent; what was held is given back as soon as nothing moves in or out of it."""
        if self.get(entry.name) is not entry:
            return
        del self._entries[entry.name]
        if entry.push is not None:
            drained = asyncio.ensure_future(entry.push.stop())
            self._draining[entry.name] = drained
            drained.add_done_callback(lambda _: self._drained(entry))
        else:
            self._give_back(entry.sequence)
            if entry.arrival is not None:
                entry.arrival.stop("the request is over")

    def _drained(self, entry: Entry) -> None:
        del self._draining[entry.name]
        self._give_back(entry.sequence)

    def _give_back(self, sequence: Sequence) -> None:
        self._engine.post(lambda engine, now_s: engine.finish(sequence))

    @staticmethod
    def _send_end(session: RouterSession, request_id: str, attempt: int, finish: pb.Finish, error: str) -> None:
        session.add_token(
            pb.TokenEvent(request_id=request_id, attempt=attempt, finish=finish, no_token=True, error=error)
        )
        session.flush()
