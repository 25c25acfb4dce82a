"""A request on its way through the workers, attempt after attempt; the states are drawn in `router.attempt.State`.

Tokens take the short way: message, `on_token`, buffer, reader; nothing waits for the transfer. Everything else is an
event for the request's one task, which waits for it with a deadline. Two rules keep the stream exact whatever dies: a
token counts only if its attempt is the present one and its index is next, and an attempt that is given up is aborted on
all its workers before the next one begins.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable

from kvstore.keys import KeyChain
from pdserve.errors import DeadlineExceeded, InternalError, Overloaded, ServeError, WorkerFailed
from pdserve.protocol import worker_pb2 as pb
from pdserve.protocol.codec import finish_from_proto, sampling_to_proto
from pdserve.request import FinishReason, Request
from pdserve.timeline import Timeline
from router.admission import Verdict
from router.attempt import Attempt, AttemptFailed, Failed, HandoffWanted, Reserved, State
from router.feeder import Feeder
from router.fleet import Fleet
from router.generation import Tokens
from router.handoff import TICK_S, HandOver
from router.limits import RouterLimits
from router.output import OutputBuffer, TokenOrder
from router.placement import Placed, Placer
from router.policy import Decision, Need, Phase
from router.waiting import Waiting
from router.wishes import Wishes

log = logging.getLogger(__name__)


class RoutedGeneration:
    """Implements `router.generation.Generation`; made and fed by `router.dispatch.RouterDispatcher`."""

    def __init__(
        self,
        request: Request,
        timeline: Timeline,
        wishes: Wishes,
        fleet: Fleet,
        placer: Placer,
        feeder: Feeder,
        limits: RouterLimits,
        counts: Counter[str],
        on_end: Callable[[RoutedGeneration, str], None],
    ) -> None:
        self.request = request
        self.timeline = timeline
        self.wishes = wishes
        self.cached_by_tier: dict[str, int] = {}
        self.workers: list[str] = []  # that did a part, in order of first use
        self.verdict: Verdict | None = None  # of admission, once there is one
        self._fleet = fleet
        self._placer = placer
        self._feeder = feeder
        self._limits = limits
        self._counts = counts
        self._on_end = on_end
        self._block_size = fleet.facts().block_size
        self._order = TokenOrder(request.sampling.max_tokens, limits.held_tokens)
        self._buffer = OutputBuffer()
        self._attempt: Attempt | None = None  # None: QUEUED
        self._flows_from = ""  # the worker whose next token is in order if it is of this attempt and of the next index
        self._attempts = 0
        self._queued_s = time.monotonic()
        self._avoid: set[str] = set()
        self._stay_on: str | None = None  # the worker that goes on alone, since it has the KV
        self._spilled = False  # the KV is in the store, and the request waits for a decode worker with room
        self._redispatches = 0
        self._migrations = 0
        self._ended_while = ""  # the state that its end came in
        self._task = asyncio.create_task(self._run(), name=f"request {request.request_id}")

    # --- the reader's side ---

    def __aiter__(self) -> AsyncIterator[Tokens]:
        return self

    def __anext__(self) -> Awaitable[Tokens]:
        return self._buffer.next()

    def abort(self) -> None:
        self._end(FinishReason.ABORT)

    def finish(self) -> None:
        self._end(FinishReason.STOP)

    # --- the workers' side; called by the dispatcher ---

    def on_token(self, worker_id: str, event: pb.TokenEvent) -> None:
        if worker_id == self._flows_from and event.finish == pb.RUNNING and self._flows(event):
            return
        attempt = self._current(worker_id, event.attempt)
        if attempt is None:
            self._counts["rejected_tokens"] += 1
            return
        finish = finish_from_proto(event.finish)
        if finish in (FinishReason.ERROR, FinishReason.ABORT):
            self._worker_failed(attempt, worker_id, event.error or f"{finish.value} without a reason")
            return
        if attempt.state is not State.DECODING or not self._order.token_ids:
            self._note_phase(attempt, worker_id, event)
        ready = self._order.offer(event)
        if ready is None:
            self._counts["rejected_tokens"] += 1
            return
        if ready:
            attempt.progress_s = time.monotonic()
        if attempt.state is State.DECODING and self._order.token_ids and not self._order.gap:
            self._flows_from = worker_id
        for each in ready:
            if not each.no_token:
                self.timeline.token(attempt.progress_s)
                self._buffer.put(each)
            if (finish := finish_from_proto(each.finish)) is not None:
                self._end(finish, finished_by=worker_id)

    def _flows(self, event: pb.TokenEvent) -> bool:
        """The short way of nearly all tokens; whether it was the next one."""
        attempt = self._attempt
        if attempt is None or event.attempt != attempt.number or event.no_token or not self._order.next(event):
            return False
        attempt.progress_s = now_s = time.monotonic()
        self.timeline.token(now_s)
        self._buffer.put(event)
        return True

    def on_handoff_wanted(self, worker_id: str, message: pb.HandoffWanted) -> None:
        if attempt := self._current(worker_id, message.attempt):
            attempt.post(HandoffWanted())

    def on_reserved(self, worker_id: str, message: pb.Reserved) -> None:
        if attempt := self._current(worker_id, message.attempt):
            attempt.post(Reserved(worker_id, message.ticket))

    def on_refused(self, worker_id: str, message: pb.Refused) -> None:
        if attempt := self._current(worker_id, message.attempt):
            self._worker_failed(attempt, worker_id, message.reason, refused=True)

    def on_worker_lost(self, worker_id: str, reason: str) -> None:
        attempt = self._attempt
        if attempt is not None and attempt.is_on(worker_id):
            self._worker_failed(attempt, worker_id, f"lost: {reason}")

    def _worker_failed(self, attempt: Attempt, worker_id: str, reason: str, *, refused: bool = False) -> None:
        """What becomes of prefill once decode goes on by itself does not matter."""
        decode_goes_on = attempt.decode is not None and attempt.state is State.DECODING and not self._order.gap
        if worker_id != attempt.prompt_id or not decode_goes_on:
            attempt.post(Failed(worker_id, reason, refused))

    def _current(self, worker_id: str, number: int) -> Attempt | None:
        attempt = self._attempt
        return attempt if attempt is not None and attempt.number == number and attempt.is_on(worker_id) else None

    def _note_phase(self, attempt: Attempt, worker_id: str, event: pb.TokenEvent) -> None:
        """The first token of a worker says how long its stages took; those that the client waited for are kept."""
        times, reported = event.times, self.timeline.reported
        if worker_id == attempt.decode_id:
            if attempt.state is State.HANDING_OFF:
                attempt.decode_began()
                self._use(worker_id)
                if len(self._order.token_ids) < 2:
                    reported.update(reserve=times.reserve_s, transfer=times.transfer_s, commit=times.commit_s)
            return
        attempt.prompt.computed()
        self._fleet.note_room()
        if not attempt.disaggregated:
            attempt.state = State.DECODING
        if not self._order.token_ids:
            reported.update(fetch=times.fetch_s, queue=times.queue_s, compute=times.compute_s)
            self.cached_by_tier = dict(event.cached_by_tier)

    # --- the task ---

    async def _run(self) -> None:
        """Attempts, until one ends the request (`_end` then cancels this task) or the budget is spent."""
        try:
            while True:
                keys = self._keys()
                self._attempt = attempt = self._begin(await self._place(keys))
                try:
                    await self._see_through(attempt, keys)
                except AttemptFailed as failure:
                    self._retreat(attempt, failure)
        except ServeError as error:
            self._end(error)
        except Exception:
            log.exception("request=%s a bug ended it", self.request.request_id)
            self._end(InternalError("The router failed."))

    async def _place(self, keys: KeyChain) -> Placed:
        """Wait, for a bounded time, for a worker that can take the request. Raises Overloaded or DeadlineExceeded."""
        if self._spilled:
            self._spilled = False
            resumed = await self._place_spilled(keys)
            if resumed is not None:
                self._stay_on = None
                return resumed
        if self._stay_on is not None:
            stay_on, self._stay_on = self._stay_on, None
            placed = self._placer.place_whole_on(stay_on, self._need(Phase.PROMPT), keys)
            if placed is not None:
                return placed
        if not self._order.token_ids:
            return await self._place_in_turn(keys)
        until_s = self._queued_s + self._limits.queue_wait_s
        while True:
            choice = self._placer.place_prompt(self._need(Phase.PROMPT, frozenset(self._avoid)), keys)
            if isinstance(choice, Placed):
                return choice
            now_s = time.monotonic()
            if now_s >= self.request.deadline_s:
                raise DeadlineExceeded("The request did not finish in time.")
            if now_s >= until_s:
                log.warning("request=%s not placed: %s", self.request.request_id, choice.why_not())
                raise Overloaded("No worker can take the request now.")
            await self._fleet.wait_change(min(until_s - now_s, TICK_S))
            self._avoid.clear()  # better a worker that failed before than none

    async def _place_in_turn(self, keys: KeyChain) -> Placed:
        """Through the queue. A request with tokens does not wait in it: its client has begun to read."""
        now_s = time.monotonic()
        if self.timeline.queued_s is None:
            self.timeline.queued_s = now_s
        last: list[Decision] = []

        def look() -> Decision:
            decision = self._placer.preview(self._need(Phase.PROMPT, frozenset(self._avoid)), keys)
            if decision.chosen is None:
                self._avoid.clear()  # better a worker that failed before than none
            last[:] = [decision]
            return decision

        try:
            return await self._feeder.place(
                Waiting(
                    tenant=self.wishes.tenant,
                    slo_class=self.wishes.slo.name,
                    queued_s=now_s,
                    request_id=self.request.request_id,
                    priority_s=self.wishes.priority,
                    slo=self.wishes.slo,
                    received_s=self.timeline.received_s,
                    deadline_s=self.request.deadline_s,
                    look=look,
                    settle=lambda decision: self._placer.settle(decision, self._need(Phase.PROMPT), keys),
                    told=self._told,
                    judged=self.verdict is not None,
                )
            )
        except ServeError:
            if last and last[0].chosen is None:
                log.warning("request=%s not placed: %s", self.request.request_id, last[0].why_not())
                self._placer.note(last[0])
            raise

    def _told(self, verdict: Verdict) -> None:
        self.verdict = verdict

    async def _place_spilled(self, keys: KeyChain) -> Placed | None:
        """Wait for a decode worker with room; None if none has any in time."""
        until_s = min(self._queued_s + self._limits.spill_wait_s, self.request.deadline_s)
        while (now_s := time.monotonic()) < until_s:
            choice = self._placer.place_resumed(self._need(Phase.RESUME, frozenset(self._avoid)), keys)
            if isinstance(choice, Placed):
                return choice
            await self._fleet.wait_change(min(until_s - now_s, TICK_S))
        return None

    def _begin(self, placed: Placed) -> Attempt:
        self._attempts += 1
        self._flows_from = ""
        self._order.restart()
        attempt = Attempt(
            self._attempts,
            placed.claim,
            resumed_tokens=len(self._order.token_ids),
            disaggregated=placed.disaggregated,
            deadline_s=self.request.deadline_s,
            limits=self._limits,
        )
        self._use(attempt.prompt_id)
        if not self._order.token_ids:
            self.timeline.dispatched_s = attempt.progress_s
        if not self._fleet.send(attempt.prompt_id, pb.RouterMessage(submit=self._submit(attempt))):
            attempt.post(Failed(attempt.prompt_id, "cannot be reached", refused=True))
        return attempt

    async def _see_through(self, attempt: Attempt, keys: KeyChain) -> None:
        """Returns only if prefill is to go on alone, in a new attempt. Raises as `Attempt.event`."""
        while True:
            if not isinstance(await attempt.event(), HandoffWanted) or attempt.state is not State.PREFILLING:
                continue
            spills = self._placer.can_spill(attempt.prompt_id)
            hand_over = HandOver(
                attempt,
                self._fleet,
                self._limits,
                choose=lambda avoid: self._placer.place_decode(
                    self._need(Phase.DECODE, avoid | self._avoid), keys, attempt.prompt_id
                ),
                submit=lambda: self._submit(attempt),
                prefilled=lambda: len(self._order.token_ids) > attempt.resumed_tokens,
                wait_s=self._limits.spill_after_s if spills else self._limits.handoff_wait_s,
            )
            if await hand_over.run():
                continue
            self._counts["handoffs_without_room"] += 1
            self._leave(attempt)
            self._stay_on, self._spilled = attempt.prompt_id, spills
            self._counts["spills"] += spills
            self._queued_s = time.monotonic()
            return

    def _need(self, phase: Phase, avoid: frozenset[str] = frozenset()) -> Need:
        done = len(self._order.token_ids)
        return Need(
            phase=phase,
            tokens=len(self.request.prompt_token_ids) + done,
            max_tokens=self.request.sampling.max_tokens - done,
            block_size=self._block_size,
            avoid=avoid,
            target=self.wishes.target,
            session=self.wishes.session,
        )

    def _keys(self) -> KeyChain:
        """Of the full blocks whose KV must exist."""
        tokens = (*self.request.prompt_token_ids, *self._order.token_ids)
        return KeyChain(self.request.root_key, tokens, self._block_size)

    def _submit(self, attempt: Attempt) -> pb.Submit:
        """The same for both workers of an attempt: decode learns the tokens made since from prefill."""
        return pb.Submit(
            request_id=self.request.request_id,
            attempt=attempt.number,
            prompt_token_ids=self.request.prompt_token_ids,
            output_token_ids=self._order.token_ids[: attempt.resumed_tokens],
            sampling=sampling_to_proto(self.request.sampling),
            root_key=self.request.root_key,
            tenant=self.request.tenant,
            disaggregated=attempt.disaggregated,
            uncached_tokens=attempt.prompt.uncached_tokens,
            remaining_s=max(0.0, self.request.deadline_s - time.monotonic()),
        )

    def _use(self, worker_id: str) -> None:
        if worker_id not in self.workers:
            self.workers.append(worker_id)

    # --- the end of an attempt and of the request ---

    def _retreat(self, attempt: Attempt, failure: AttemptFailed) -> None:
        """Give the attempt up, everywhere. Raises a ServeError when no further one is allowed."""
        log.warning(
            "request=%s attempt=%d state=%s worker=%s failed: %s",
            *(self.request.request_id, attempt.number, attempt.state.value, failure.worker_id, failure),
        )
        self._leave(attempt)
        self._avoid.add(failure.worker_id)
        if attempt.state is State.HANDING_OFF and attempt.decode_id is not None and not failure.refused:
            self._fleet.pairing.distrust(attempt.prompt_id, attempt.decode_id)
        if failure.refused and attempt.state is State.PREFILLING:
            self._counts["refusals"] += 1  # nothing was begun; how long this may go on is the queue's limit
            return
        self._queued_s = time.monotonic()
        # A worker that changes its role has not failed: moving away from it costs no retry.
        if self._order.token_ids:
            self._migrations += not failure.refused
            self._counts["migrations"] += 1
        else:
            self._redispatches += not failure.refused
            self._counts["redispatches"] += 1
        if self._redispatches > self._limits.redispatches or self._migrations > self._limits.migrations:
            if failure.stalled:
                raise DeadlineExceeded("The workers made no progress in time.")
            raise WorkerFailed("The workers failed while they ran the request.")

    def _leave(self, attempt: Attempt) -> None:
        self._attempt = None
        abort = pb.Abort(request_id=self.request.request_id, attempt=attempt.number)
        for worker_id in attempt.worker_ids:
            self._fleet.send(worker_id, pb.RouterMessage(abort=abort))
        attempt.release()

    def _end(self, end: FinishReason | ServeError, finished_by: str | None = None) -> None:
        """The one way out, from anywhere. Idempotent."""
        if self._buffer.closed:
            return
        self._buffer.close(end)
        attempt = self._attempt
        self._ended_while = attempt.state.value if attempt is not None else "queued"
        if attempt is not None:
            if finished_by == attempt.worker_ids[-1]:
                attempt.release()  # a prefill worker before it had done its part
                self._attempt = None
            else:
                self._leave(attempt)
        self._on_end(self, _name(end))
        self._fleet.note_room()
        if asyncio.current_task() is not self._task:
            self._task.cancel()

    def log_end(self, end: str) -> None:
        """One line: what it was, and where its time went; stages of a hand-over only if there was one."""
        timeline = self.timeline
        stages = (*timeline.ttft_stages().items(), *timeline.handoff_stages().items())
        log.info(
            "request=%s client_id=%s end=%s state=%s workers=%s attempts=%d prompt_tokens=%d cached_tokens=%d "
            "output_tokens=%d %s",
            self.request.request_id,
            self.wishes.label,
            end,
            self._ended_while,
            ",".join(self.workers) or "-",
            self._attempts,
            len(self.request.prompt_token_ids),
            sum(self.cached_by_tier.values()),
            len(self._order.token_ids),
            " ".join([f"{stage}_ms={seconds * 1e3:.2f}" for stage, seconds in stages]),
        )


def _name(end: FinishReason | ServeError) -> str:
    return end.value if isinstance(end, FinishReason) else end.code or end.type
