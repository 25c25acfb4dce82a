"""The dispatcher: requests in, generations out, and each worker message to the generation that it belongs to."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Sequence

from kvstore.keys import BlockKey, KeyChain
from pdserve.errors import InvalidRequest, Overloaded, UnknownWorker
from pdserve.protocol import worker_pb2 as pb
from pdserve.request import Request
from pdserve.timeline import Timeline
from router.account import Account
from router.admission import Mode
from router.feeder import Feeder
from router.fleet import Fleet
from router.hot_copies import HotCopies
from router.limits import RouterLimits
from router.placement import Placer
from router.policy import POLICIES, Decision, Need, Phase, Policy
from router.policy.filters import named
from router.records import Records
from router.routed import RoutedGeneration
from router.wishes import NO_WISHES, Wishes

log = logging.getLogger(__name__)


class RouterDispatcher:
    """Implements `router.generation.Dispatcher` and `router.fleet.RequestListener`.

    Attributes:
        counts: only rise: rejected_tokens, refusals, redispatches, migrations, handoffs_without_room, spills.
        decisions: by policy, phase and outcome ("chosen" or "nobody"); only rise.
        draining: the router ends, and takes nothing new.
    """

    def __init__(
        self,
        fleet: Fleet,
        policy: Policy,
        limits: RouterLimits,
        records: Records | None = None,
        mode: Mode = Mode.SHADOW,
        *,
        skips_handoffs: bool = False,
    ) -> None:
        self.counts: Counter[str] = Counter()
        self.decisions: Counter[tuple[str, str, str]] = Counter()
        self.draining = False
        self.account = Account(fleet, records if records is not None else Records())
        self.feeder = Feeder(fleet, self.account.predictor, limits, mode)
        self.hot = HotCopies(fleet, limits.hot_copy_bytes, limits.hot_copy_window_s)
        self._fleet = fleet
        self._policy = policy
        self._skips_handoffs = skips_handoffs
        self._turns: Counter[Phase] = Counter()
        self._limits = limits
        self._active: dict[str, RoutedGeneration] = {}
        self._unsettled = 0  # have ended, and are not accounted for yet
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def num_active(self) -> int:
        return len(self._active)

    def start(self, request: Request, timeline: Timeline, wishes: Wishes = NO_WISHES) -> RoutedGeneration:
        """Raises Overloaded, InvalidRequest, or UnknownWorker for a name that a request would wait for in vain."""
        if len(self._active) >= self._limits.active_requests:
            raise Overloaded("The server is handling as many requests as it can.")
        assert request.request_id not in self._active, "the front makes unique ids"
        self._check_length(request)
        policy = self._policy_of(wishes)
        record = self.account.open(request, wishes)

        def note(decision: Decision) -> None:
            outcome = "chosen" if decision.chosen is not None else "nobody"
            self.decisions[decision.policy, decision.phase.value, outcome] += 1
            record.note(decision)

        def placed(decision: Decision, need: Need, keys: Sequence[BlockKey]) -> None:
            record.copy = self.hot.placed(decision, need, keys) or record.copy

        placer = Placer(self._fleet, policy, self._turns, note, self._handoff_s, placed)
        generation = RoutedGeneration(
            request, timeline, wishes, self._fleet, placer, self.feeder, self._limits, self.counts, self._ended
        )
        self._active[request.request_id] = generation
        self._idle.clear()
        return generation

    def dry_run(self, request: Request, wishes: Wishes = NO_WISHES) -> Decision:
        """What `start` would decide first, now. Runs and changes nothing. Raises as `start`."""
        self._check_length(request)
        facts = self._fleet.facts()
        need = Need(
            phase=Phase.PROMPT,
            tokens=len(request.prompt_token_ids),
            max_tokens=request.sampling.max_tokens,
            block_size=facts.block_size,
            target=wishes.target,
            session=wishes.session,
        )
        keys = KeyChain(request.root_key, request.prompt_token_ids, facts.block_size)
        placer = Placer(self._fleet, self._policy_of(wishes), self._turns, lambda decision: None, self._handoff_s)
        return placer.preview(need, keys)

    def _check_length(self, request: Request) -> None:
        longest = self._fleet.facts().max_model_len
        if len(request.prompt_token_ids) >= longest:
            raise InvalidRequest(f"The workers serve at most {longest} tokens, the answer included.", param="prompt")

    def _handoff_s(self) -> float | None:
        return self.account.predictor.handoff_s if self._skips_handoffs else None

    def _policy_of(self, wishes: Wishes) -> Policy:
        policy = self._policy if wishes.policy is None else POLICIES[wishes.policy]
        if wishes.target is not None and named in policy.filters and self._fleet.named(wishes.target) is None:
            raise UnknownWorker(f"No worker is named '{wishes.target[:64]}', as x-pdserve-worker says.")
        return policy

    def _ended(self, generation: RoutedGeneration, end: str) -> None:
        del self._active[generation.request.request_id]
        self.feeder.ended(generation.request.request_id)
        self._unsettled += 1
        # What is learned from it waits for two turns of the loop: in the next one its reader has the end, and what
        # that one writes leaves at the end of the turn.
        loop = asyncio.get_running_loop()
        loop.call_soon(loop.call_soon, self._settle, generation, end)

    def _settle(self, generation: RoutedGeneration, end: str) -> None:
        self._unsettled -= 1
        generation.log_end(end)
        outcome, verdict = self.account.close(generation, end), generation.verdict
        # Its outcome says nothing of a verdict by another class's TTFT.
        by_its_own = verdict is not None and verdict.ttft_s == generation.wishes.slo.ttft_s
        if verdict is not None and by_its_own and outcome is not None and not verdict.refused:
            self.feeder.ledger.ran(condemned=verdict.reason is not None, good=outcome)
        if not self._active and not self._unsettled:
            self._idle.set()

    async def drain(self, timeout_s: float) -> bool:
        """Wait until nothing is active and all is accounted for; whether that was so in time."""
        self.draining = True
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True

    def abort_all(self) -> None:
        for generation in list(self._active.values()):
            generation.abort()

    # --- router.fleet.RequestListener ---

    def on_message(self, worker_id: str, message: pb.WorkerMessage) -> None:
        match message.WhichOneof("body"):
            case "step":
                self._on_step(worker_id, message.step)
            case "handoff_wanted":
                if generation := self._active.get(message.handoff_wanted.request_id):
                    generation.on_handoff_wanted(worker_id, message.handoff_wanted)
            case "reserved":
                if generation := self._active.get(message.reserved.request_id):
                    generation.on_reserved(worker_id, message.reserved)
            case "refused":
                if generation := self._active.get(message.refused.request_id):
                    generation.on_refused(worker_id, message.refused)

    def _on_step(self, worker_id: str, step: pb.StepOutput) -> None:
        for event in step.tokens:
            generation = self._active.get(event.request_id)
            if generation is None:
                self.counts["rejected_tokens"] += 1  # of a request that has ended meanwhile
            else:
                generation.on_token(worker_id, event)

    def on_worker_lost(self, worker_id: str, reason: str) -> None:
        for generation in list(self._active.values()):
            generation.on_worker_lost(worker_id, reason)
