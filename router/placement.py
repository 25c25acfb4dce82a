"""Joins what is needed, what the index and the fleet know, and the policy; and remembers what was sent where."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from kvstore.keys import BlockKey, landmarks
from router.fleet import Fleet
from router.member import Member
from router.policy import Considered, Decision, Need, Phase, Policy, Role
from router.policy.local import skips_handoff

# Beyond the predicted end of its prefill, blocks count as held so long without a word from the worker.
_EXPECT_MARGIN_S = 5.0
_EXPECT_AT_MOST_S = 60.0
_LOADS = (Phase.PROMPT, Phase.WHOLE, Phase.LOCAL)  # phases in which a worker loads from the store what it lacks


class Claim:
    """One request's share of the load that this router knows a worker to have. Releasing is idempotent."""

    def __init__(self, member: Member, uncached_tokens: int) -> None:
        self.worker_id = member.worker_id
        self.uncached_tokens = uncached_tokens
        self._member = member
        self._tokens = uncached_tokens
        self._held = True
        self._ticket = member.backlog.sent(uncached_tokens, time.monotonic()) if uncached_tokens else -1
        member.take(uncached_tokens)

    def computed(self) -> None:
        """The prompt's tokens wait no longer: its first token is there."""
        self._member.backlog.computed(self._ticket, time.monotonic())
        self._wait_no_longer()

    def release(self) -> None:
        if self._held:
            self._held = False
            self._member.backlog.dropped(self._ticket, time.monotonic())
            self._wait_no_longer()
            self._member.give_back()

    def _wait_no_longer(self) -> None:
        self._member.computed(self._tokens)
        self._tokens = 0


@dataclass(frozen=True, slots=True)
class Placed:
    claim: Claim
    disaggregated: bool


class Placer:
    """Places one request. `keys` are those of all full blocks of the tokens whose KV is needed."""

    def __init__(
        self,
        fleet: Fleet,
        policy: Policy,
        turns: Counter[Phase],
        note: Callable[[Decision], None],
        handoff_s: Callable[[], float | None] = lambda: None,
        placed: Callable[[Decision, Need, Sequence[BlockKey]], object] = lambda decision, need, keys: None,
    ) -> None:
        """
        Args:
            turns: by phase, shared by all requests of the router.
            note: is told each decision.
            placed: is told each decision that a prompt was placed by.
            handoff_s: what a hand-over costs a request; None: it is never skipped.
        """
        self._fleet = fleet
        self._policy = policy
        self._turns = turns
        self._handoff_s = handoff_s
        self.note = note
        self._placed = placed

    def preview(self, need: Need, keys: Sequence[BlockKey]) -> Decision:
        """What `place_prompt` would decide now; changes nothing."""
        decision = self._look(need, keys)
        if decision.chosen is None:
            return self._look(replace(need, phase=Phase.WHOLE), keys)
        return self._local(decision.chosen, need, keys) or decision

    def _local(self, chosen: Considered, need: Need, keys: Sequence[BlockKey]) -> Decision | None:
        """Where the request runs without a hand-over, if that is better than on `chosen`."""
        handoff_s = self._handoff_s()
        if handoff_s is None or need.target is not None or Phase.LOCAL not in self._policy.scorers:
            return None
        member = self._fleet.member(chosen.worker_id)
        if member is None or not self._hands_over(member, need):
            return None
        local = self._look(replace(need, phase=Phase.LOCAL), keys)
        return local if local.chosen is not None and skips_handoff(chosen, local.chosen, handoff_s) else None

    @staticmethod
    def _hands_over(member: Member, need: Need) -> bool:
        return member.role is Role.PREFILL and need.max_tokens > 1

    def place_prompt(self, need: Need, keys: Sequence[BlockKey]) -> Placed | Decision:
        """The worker for the prompt; when the roles for it are missing, any worker for the whole request.

        `need.phase` is PROMPT. A decision instead of a placement says why there is none.
        """
        decision = self.preview(need, keys)
        return self.settle(decision, need, keys) if decision.chosen is not None else decision

    def settle(self, decision: Decision, need: Need, keys: Sequence[BlockKey]) -> Placed:
        """As `preview` decided in the same turn of the event loop, and chose somebody."""
        self._turns[decision.phase] += 1
        self.note(decision)
        assert decision.chosen is not None
        member = self._fleet.member(decision.chosen.worker_id)
        assert member is not None
        disaggregated = decision.phase is Phase.PROMPT and self._hands_over(member, need)
        self._expect(member, keys, decision.chosen)
        self._placed(decision, need, keys)
        held_blocks = decision.chosen.matched_blocks + decision.chosen.fetched_blocks
        return Placed(self._claim(member, need, held_blocks), disaggregated)

    def place_whole_on(self, worker_id: str, need: Need, keys: Sequence[BlockKey]) -> Placed | None:
        """The whole request on the worker that has its KV, by no policy; None when it is gone."""
        member = self._fleet.member(worker_id)
        if member is None:
            return None
        matched_blocks = self._fleet.index.match(keys).of(member.slot)
        return Placed(self._claim(member, need, matched_blocks), disaggregated=False)

    def place_resumed(self, need: Need, keys: Sequence[BlockKey]) -> Placed | Decision:
        """A decode worker with room that finds the KV of `keys` in the store. `need.phase` is RESUME."""
        decision = self._decide(need, keys)
        if decision.chosen is None:
            return decision
        member = self._fleet.member(decision.chosen.worker_id)
        assert member is not None
        return Placed(self._claim(member, need, need.full_blocks), disaggregated=False)

    def can_spill(self, prompt_id: str) -> bool:
        """Whether what this worker computes lies in a store that a decode worker reads too."""
        member = self._fleet.member(prompt_id)
        return member is not None and member.hello.has_store and self._fleet.decodes_from_store

    def place_decode(self, need: Need, keys: Sequence[BlockKey], prompt_id: str) -> Claim | Decision:
        """The worker that takes over from `prompt_id`. `need.phase` is DECODE."""
        decision = self._decide(need, keys, linked_from=prompt_id)
        if decision.chosen is None:
            return decision
        member = self._fleet.member(decision.chosen.worker_id)
        assert member is not None
        return Claim(member, 0)

    def _decide(self, need: Need, keys: Sequence[BlockKey], linked_from: str | None = None) -> Decision:
        decision = self._look(need, keys, linked_from)
        self._turns[need.phase] += 1
        self.note(decision)
        return decision

    def _look(self, need: Need, keys: Sequence[BlockKey], linked_from: str | None = None) -> Decision:
        match = self._fleet.index.match(keys)
        stored = self._fleet.stores.index.match(keys) if need.phase in _LOADS else None
        candidates = self._fleet.candidates(match, time.monotonic(), linked_from=linked_from, stored=stored)
        return self._policy.decide(need, candidates, self._turns[need.phase])

    def _expect(self, member: Member, keys: Sequence[BlockKey], chosen: Considered) -> None:
        """Whoever shares this prompt's beginning may follow it there, before the worker says that it has the blocks."""
        now_s = time.monotonic()
        computed_s = chosen.queued_s + chosen.fetch_s + chosen.uncached_s
        expires_s = now_s + min(computed_s + _EXPECT_MARGIN_S, _EXPECT_AT_MOST_S)
        self._fleet.index.expect(member.slot, landmarks(keys), now_s, expires_s)

    def _claim(self, member: Member, need: Need, held_blocks: int) -> Claim:
        uncached_tokens = max(1, need.tokens - held_blocks * need.block_size)
        self._fleet.columns.add_recent(member.slot, uncached_tokens, time.monotonic())
        return Claim(member, uncached_tokens)
