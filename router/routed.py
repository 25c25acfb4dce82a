"""A request on its way through the workers: the state machine drawn in `router.attempt.State`, attempt after attempt.

Tokens take the short way: message -> `on_token` -> buffer -> reader; nothing waits for the transfer. Everything else is an
event for one task per request, which waits for it with a deadline. Two rules keep the stream exact whatever dies: a token
counts only if its attempt is the present one and its index is next, and an attempt that is given up is aborted on all its
workers before the next one begins.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable

from kvstore.keys import BlockKey, block_keys
from pdserve.errors import DeadlineExceeded, InternalError, Overloaded, ServeError, WorkerFailed
from pdserve.protocol import worker_pb2 as pb
from pdserve.protocol.codec import finish_from_proto, sampling_to_proto
from pdserve.request import FinishReason, Request
from pdserve.timeline import Timeline
from router.attempt import Attempt, AttemptFailed, DecodeBegan, Event, Failed, HandoffWanted, Reserved, State
from router.fleet import Fleet
from router.generation import Tokens
from router.limits import RouterLimits
from router.output import OutputBuffer, TokenOrder
from router.placement import Claim, Placed, Placer
from router.policy import Need, Phase

log = logging.getLogger(__name__)

# A look at the fleet while nobody has room; workers report their load this often.
_TICK_S = 0.1


class RoutedGeneration:
    """Implements `router.generation.Generation`. Made and fed by `router.dispatch.RouterDispatcher`, in the event loop."""

    def __init__(
        self,
        request: Request,
        timeline: Timeline,
        wire_id: str,
        target: str | None,
        fleet: Fleet,
        placer: Placer,
        limits: RouterLimits,
        counts: Counter[str],
        on_end: Callable[[RoutedGeneration], None],
    ) -> None:
        self.request = request
        self.timeline = timeline
        self.cached_tokens = 0
        self.workers: list[str] = []  # that did a part, in order of first use
        self.wire_id = wire_id  # unique among all routers' requests, whatever id the client chose
        self.state = State.QUEUED
        self._target = target
        self._fleet = fleet
        self._placer = placer
        self._limits = limits
        self._counts = counts
        self._on_end = on_end
        self._block_size = fleet.facts().block_size
        self._order = TokenOrder(request.sampling.max_tokens, limits.held_tokens)
        self._buffer = OutputBuffer()
        self._attempt: Attempt | None = None
        self._attempts = 0
        self._avoid: set[str] = set()
        self._stay_on: str | None = None  # the worker to go on alone with
        self._redispatches = 0
        self._migrations = 0
        self._queued_s = self._progress_s = time.monotonic()
        self._inbox: deque[Event] = deque()
        self._wake = asyncio.Event()
        self._task = asyncio.create_task(self._run(), name=f"request {wire_id}")

    # --- the reader's side ---

    def __aiter__(self) -> AsyncIterator[Tokens]:
        return self

    async def __anext__(self) -> Tokens:
        return await self._buffer.next()

    def abort(self) -> None:
        self._end(FinishReason.ABORT)

    # --- the workers' side; called by the dispatcher ---

    def on_token(self, worker_id: str, event: pb.TokenEvent) -> None:
        attempt = self._current(worker_id, event.attempt)
        if attempt is None:
            self._counts["rejected_tokens"] += 1
            return
        finish = finish_from_proto(event.finish)
        if finish in (FinishReason.ERROR, FinishReason.ABORT):
            self._post(Failed(worker_id, event.error or f"{finish.value} without a reason"))
            return
        self._note_phase(attempt, worker_id, event)
        ready = self._order.offer(event)
        if ready is None:
            self._counts["rejected_tokens"] += 1
            return
        for each in ready:
            self._deliver(each, worker_id)

    def on_handoff_wanted(self, worker_id: str, message: pb.HandoffWanted) -> None:
        if self._current(worker_id, message.attempt) is not None:
            self._post(HandoffWanted())

    def on_reserved(self, worker_id: str, message: pb.Reserved) -> None:
        if self._current(worker_id, message.attempt) is not None:
            self._post(Reserved(worker_id, message.ticket))

    def on_refused(self, worker_id: str, message: pb.Refused) -> None:
        if self._current(worker_id, message.attempt) is not None:
            self._post(Failed(worker_id, message.reason, refused=True))

    def on_worker_lost(self, worker_id: str, reason: str) -> None:
        attempt = self._attempt
        if attempt is None or worker_id not in attempt.worker_ids:
            return
        done_its_part = self.state is State.DECODING and attempt.decode is not None and not self._order.gap
        if worker_id == attempt.prompt_id and done_its_part:
            return
        self._post(Failed(worker_id, f"lost: {reason}"))

    def _current(self, worker_id: str, number: int) -> Attempt | None:
        attempt = self._attempt
        return attempt if attempt is not None and attempt.number == number and worker_id in attempt.worker_ids else None

    def _post(self, event: Event) -> None:
        self._inbox.append(event)
        self._wake.set()

    def _note_phase(self, attempt: Attempt, worker_id: str, event: pb.TokenEvent) -> None:
        times, reported = event.times, self.timeline.reported
        if worker_id == attempt.decode_id and self.state is State.HANDING_OFF:
            self.state = State.DECODING
            attempt.prompt.release()
            self._progress_s = time.monotonic()
            self._post(DecodeBegan())
            if self.timeline.second_token_s is None:
                reported.update(reserve=times.reserve_s, transfer=times.transfer_s, commit=times.commit_s)
        elif worker_id == attempt.prompt_id and self.state is not State.DECODING:
            attempt.prompt.computed()
            if not attempt.disaggregated:
                self.state = State.DECODING
            if self.timeline.first_token_s is None:
                reported.update(queue=times.queue_s, compute=times.compute_s)
                self.cached_tokens = event.cached_tokens

    def _deliver(self, event: pb.TokenEvent, worker_id: str) -> None:
        self._progress_s = time.monotonic()
        if not event.no_token:
            self.timeline.token(self._progress_s)
            self._buffer.put(event.token_id)
        finish = finish_from_proto(event.finish)
        if finish is not None:
            self._end(finish, finished_by=worker_id)

    # --- the task ---

    async def _run(self) -> None:
        """Attempts, until one ends the request (`_end` then cancels this task) or the budget is spent."""
        try:
            while True:
                try:
                    await self._try()
                except AttemptFailed as failure:
                    self._retreat(failure)
        except ServeError as error:
            self._end(error)
        except Exception:
            log.exception("request=%s a bug ended it", self.wire_id)
            self._end(InternalError("the router failed"))

    async def _try(self) -> None:
        placed = await self._place()
        self._submit(placed)
        if placed.disaggregated:
            while not isinstance(await self._event(), HandoffWanted):
                pass
            await self._hand_over()
        while True:
            await self._event()

    async def _place(self) -> Placed:
        """QUEUED, for a bounded time. Raises Overloaded."""
        self.state = State.QUEUED
        until_s = self._queued_s + self._limits.queue_wait_s
        while True:
            now_s = time.monotonic()
            need, keys = self._need(Phase.PROMPT), self._keys()
            if self._stay_on is not None:
                stay_on, self._stay_on = self._stay_on, None
                placed = self._placer.place_whole_on(stay_on, need, keys, now_s)
                if placed is not None:
                    return placed
            choice = self._placer.place_prompt(need, keys, now_s)
            if isinstance(choice, Placed):
                return choice
            if now_s >= until_s:
                log.warning("request=%s not placed: %s", self.wire_id, choice.why_not())
                raise Overloaded("no worker can take the request now")
            await self._event(min(until_s, now_s + _TICK_S))
            self._avoid.clear()  # better a worker that failed before than none

    def _need(self, phase: Phase, avoid: frozenset[str] | None = None) -> Need:
        done = len(self._order.token_ids)
        return Need(
            phase=phase,
            tokens=len(self.request.prompt_token_ids) + done,
            max_tokens=self.request.sampling.max_tokens - done,
            block_size=self._block_size,
            avoid=frozenset(self._avoid) if avoid is None else avoid,
            target=self._target,
        )

    def _keys(self) -> list[BlockKey]:
        tokens = (*self.request.prompt_token_ids, *self._order.token_ids)
        return block_keys(self.request.root_key, tokens, self._block_size)

    def _submit(self, placed: Placed) -> None:
        self._attempts += 1
        self._inbox.clear()
        self._order.restart()
        self._attempt = attempt = Attempt(self._attempts, placed.claim, placed.disaggregated)
        self.state = State.PREFILLING
        self._use(attempt.prompt_id)
        self._progress_s = time.monotonic()
        if self.timeline.first_token_s is None:
            self.timeline.dispatched_s = self._progress_s
        self._send(attempt.prompt_id, pb.RouterMessage(submit=self._submit_message(attempt)))

    def _submit_message(self, attempt: Attempt) -> pb.Submit:
        return pb.Submit(
            request_id=self.wire_id,
            attempt=attempt.number,
            prompt_token_ids=self.request.prompt_token_ids,
            output_token_ids=self._order.token_ids,
            sampling=sampling_to_proto(self.request.sampling),
            root_key=self.request.root_key,
            disaggregated=attempt.disaggregated,
            remaining_s=max(0.0, self.request.deadline_s - time.monotonic()),
        )

    def _send(self, worker_id: str, message: pb.RouterMessage) -> None:
        if not self._fleet.send(worker_id, message):
            self._post(Failed(worker_id, "cannot be reached"))

    def _use(self, worker_id: str) -> None:
        if worker_id not in self.workers:
            self.workers.append(worker_id)

    # --- the hand-over: HANDOFF_WANTED to DECODING ---

    async def _hand_over(self) -> None:
        """Returns once decode streams. When nobody has room in time, prefill goes on alone, as a new attempt."""
        attempt = self._attempt
        assert attempt is not None
        until_s = time.monotonic() + self._limits.handoff_wait_s
        refused: set[str] = set()
        silent: set[str] = set()
        while True:
            self.state = State.HANDOFF_WANTED
            now_s = time.monotonic()
            need = self._need(Phase.DECODE, frozenset(refused | silent))
            choice = self._placer.place_decode(need, self._keys(), now_s, attempt.prompt_id)
            if isinstance(choice, Claim):
                ticket = await self._reserve(attempt, choice, refused, silent)
                if ticket is not None:
                    return await self._transfer(attempt, ticket)
            elif now_s < until_s:
                await self._event(min(until_s, now_s + _TICK_S))
                refused.clear()
            else:
                log.info("request=%s goes on at worker=%s: %s", self.wire_id, attempt.prompt_id, choice.why_not())
                self._counts["handoffs_without_room"] += 1
                self._leave_attempt()
                self._stay_on = attempt.prompt_id
                self._queued_s = time.monotonic()
                return await self._try()

    async def _reserve(self, attempt: Attempt, claim: Claim, refused: set[str], silent: set[str]) -> pb.Ticket | None:
        """Ask one decode worker; None when it refuses, fails or does not answer, and it is noted in one of the sets."""
        attempt.decode = claim
        self.state = State.RESERVING
        prefill = self._fleet.member(attempt.prompt_id)
        reserve = pb.Reserve(
            request=self._submit_message(attempt),
            prefill_worker_id=attempt.prompt_id,
            prefill_incarnation=prefill.hello.incarnation if prefill is not None else 0,
        )
        self._send(claim.worker_id, pb.RouterMessage(reserve=reserve))
        answer = await self._event(time.monotonic() + self._limits.reserve_s)
        if isinstance(answer, Reserved):
            return answer.ticket
        if isinstance(answer, Failed):
            log.info("request=%s worker=%s no reservation: %s", self.wire_id, claim.worker_id, answer.reason)
            refused.add(claim.worker_id)
        else:
            silent.add(claim.worker_id)  # not asked again: its late answer would be to an aborted reservation
        self._abort_on(claim.worker_id, attempt.number)
        claim.release()
        attempt.decode = None
        return None

    async def _transfer(self, attempt: Attempt, ticket: pb.Ticket) -> None:
        assert attempt.decode is not None
        self.state = State.HANDING_OFF
        self._use(attempt.decode.worker_id)
        decode = self._fleet.member(attempt.decode.worker_id)
        block_bytes = decode.hello.block_bytes if decode is not None else 0
        handoff = pb.Handoff(request_id=self.wire_id, attempt=attempt.number, ticket=ticket)
        self._send(attempt.prompt_id, pb.RouterMessage(handoff=handoff))
        limit_s = self._limits.handoff_s(len(ticket.block_ids), block_bytes)
        if not isinstance(await self._event(time.monotonic() + limit_s), DecodeBegan):
            raise AttemptFailed(attempt.decode.worker_id, f"no token {limit_s:.1f} s after the hand-over began")

    # --- waiting ---

    async def _event(self, until_s: float = math.inf) -> Event | None:
        """The next event, or None at `until_s`.

        Raises:
            AttemptFailed: a worker failed, other than one that was only asked for a reservation, or made no progress.
            DeadlineExceeded: the request's own deadline.
        """
        while True:
            if self._inbox:
                event = self._inbox.popleft()
                if isinstance(event, Failed) and not self._is_refused_reservation(event):
                    raise AttemptFailed(event.worker_id, event.reason, refused=event.refused)
                return event
            now_s = time.monotonic()
            if now_s >= self.request.deadline_s:
                raise DeadlineExceeded("the request did not finish in time")
            if now_s >= until_s:
                return None
            stalled_s = self._stalled_at_s()
            if now_s >= stalled_s and self._attempt is not None:
                raise AttemptFailed(self._attempt.worker_ids[-1], f"stalled while {self.state.value}", stalled=True)
            self._wake.clear()
            await _wait(self._wake, min(until_s, stalled_s, self.request.deadline_s) - now_s)

    def _is_refused_reservation(self, event: Failed) -> bool:
        return (
            self.state is State.RESERVING and self._attempt is not None and event.worker_id == self._attempt.decode_id
        )

    def _stalled_at_s(self) -> float:
        """When the lack of tokens becomes a failure. The steps of a hand-over have deadlines of their own."""
        if self.state is State.PREFILLING:
            return self._progress_s + self._limits.first_token_s
        if self.state is State.DECODING:
            return self._progress_s + self._limits.inter_token_s
        return math.inf

    # --- the end of an attempt and of the request ---

    def _retreat(self, failure: AttemptFailed) -> None:
        """Give the attempt up, everywhere; raises a ServeError when no further one is allowed."""
        log.warning(
            "request=%s attempt=%d state=%s worker=%s failed: %s",
            self.wire_id, self._attempts, self.state.value, failure.worker_id, failure,
        )  # fmt: skip
        untouched = failure.refused and self.state is State.PREFILLING
        self._leave_attempt()
        self._avoid.add(failure.worker_id)
        if untouched:
            self._counts["refusals"] += 1
            return
        self._queued_s = time.monotonic()
        if self._order.token_ids:
            self._migrations += 1
            self._counts["migrations"] += 1
        else:
            self._redispatches += 1
            self._counts["redispatches"] += 1
        if self._redispatches > self._limits.redispatches or self._migrations > self._limits.migrations:
            if failure.stalled:
                raise DeadlineExceeded("the workers made no progress in time")
            raise WorkerFailed("the workers failed while they ran the request")

    def _leave_attempt(self) -> None:
        attempt, self._attempt = self._attempt, None
        if attempt is not None:
            for worker_id in attempt.worker_ids:
                self._abort_on(worker_id, attempt.number)
            attempt.release()

    def _abort_on(self, worker_id: str, number: int) -> None:
        self._fleet.send(worker_id, pb.RouterMessage(abort=pb.Abort(request_id=self.wire_id, attempt=number)))

    def _end(self, end: FinishReason | ServeError, finished_by: str | None = None) -> None:
        """The one way out, from anywhere. Idempotent."""
        if self._buffer.closed:
            return
        self._buffer.close(end)
        attempt = self._attempt
        if attempt is not None and finished_by is not None and finished_by == attempt.decode_id:
            attempt.release()  # prefill's part was over before
            self._attempt = None
        self._leave_attempt()
        self._log_end(end)
        self.state = State.DONE
        self._on_end(self)
        if asyncio.current_task() is not self._task:
            self._task.cancel()

    def _log_end(self, end: FinishReason | ServeError) -> None:
        timeline = self.timeline
        stages = {**timeline.ttft_stages(), **(timeline.handoff_stages() if len(self.workers) > 1 else {})}
        log.info(
            "request=%s end=%s in_state=%s workers=%s attempts=%d prompt_tokens=%d cached_tokens=%d output_tokens=%d %s",
            self.wire_id,
            end.value if isinstance(end, FinishReason) else end.code,
            self.state.value,
            ",".join(self.workers) or "-",
            self._attempts,
            len(self.request.prompt_token_ids),
            self.cached_tokens,
            timeline.output_tokens,
            " ".join(f"{stage}_ms={seconds * 1e3:.1f}" for stage, seconds in stages.items()),
        )


async def _wait(event: asyncio.Event, timeout_s: float) -> None:
    try:
        async with asyncio.timeout(timeout_s):
            await event.wait()
    except TimeoutError:
        pass
