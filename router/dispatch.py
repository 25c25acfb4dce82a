"""The dispatcher: requests in, generations out, and each worker message to the generation that it belongs to."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter

from pdserve.errors import InvalidRequest, Overloaded
from pdserve.protocol import worker_pb2 as pb
from pdserve.request import Request
from pdserve.timeline import Timeline
from router.fleet import Fleet
from router.limits import RouterLimits
from router.placement import Placer
from router.policy import Policy
from router.routed import RoutedGeneration

log = logging.getLogger(__name__)


class RouterDispatcher:
    """Implements `router.generation.Dispatcher` and `router.fleet.RequestListener`.

    `counts` only rise: rejected_tokens, refusals, redispatches, migrations, handoffs_without_room, spills.
    """

    def __init__(self, fleet: Fleet, policy: Policy, limits: RouterLimits) -> None:
        self.counts: Counter[str] = Counter()
        self._fleet = fleet
        self._placer = Placer(fleet, policy)
        self._limits = limits
        self._active: dict[str, RoutedGeneration] = {}
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def num_active(self) -> int:
        return len(self._active)

    def start(self, request: Request, timeline: Timeline, target: str | None = None) -> RoutedGeneration:
        """`target` names a worker, for the policy `direct`. Raises Overloaded or InvalidRequest."""
        if len(self._active) >= self._limits.active_requests:
            raise Overloaded("The server is handling as many requests as it can.")
        assert request.request_id not in self._active, "the front makes unique ids"
        longest = self._fleet.facts().max_model_len
        if len(request.prompt_token_ids) >= longest:
            raise InvalidRequest(f"The workers serve at most {longest} tokens, the answer included.", param="prompt")
        generation = RoutedGeneration(
            request, timeline, target, self._fleet, self._placer, self._limits, self.counts, self._ended
        )
        self._active[request.request_id] = generation
        self._idle.clear()
        return generation

    def _ended(self, generation: RoutedGeneration) -> None:
        del self._active[generation.request.request_id]
        if not self._active:
            self._idle.set()

    async def drain(self, timeout_s: float) -> bool:
        """Wait until nothing is active; whether that was so in time."""
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
