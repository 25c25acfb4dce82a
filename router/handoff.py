"""The hand-over of one attempt: a decode worker is chosen late, asked for room, and named to prefill by its ticket."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from pdserve.protocol import worker_pb2 as pb
from router.attempt import Attempt, AttemptFailed, DecodeBegan, Failed, Reserved, State
from router.fleet import Fleet
from router.limits import RouterLimits
from router.placement import Claim
from router.policy import Decision

log = logging.getLogger(__name__)

# Between two looks at a fleet in which nobody has room; workers report their load this often.
TICK_S = 0.1


class HandOver:
    """From HANDOFF_WANTED to DECODING.

    `choose` places the rest of the request on a decode worker, none of those given; `submit` makes the request's
    message; `wait_s` is for a worker that has room. Nothing is given up before the prompt is `prefilled`, or its last
    chunk would be computed for nothing.
    """

    def __init__(
        self,
        attempt: Attempt,
        fleet: Fleet,
        limits: RouterLimits,
        choose: Callable[[frozenset[str]], Claim | Decision],
        submit: Callable[[], pb.Submit],
        prefilled: Callable[[], bool],
        wait_s: float,
    ) -> None:
        self._attempt = attempt
        self._fleet = fleet
        self._limits = limits
        self._choose = choose
        self._submit = submit
        self._prefilled = prefilled
        self._wait_s = wait_s
        self._refused: set[str] = set()  # asked again a little later
        self._silent: set[str] = set()  # not asked again: a late answer would be to an aborted reservation

    async def run(self) -> bool:
        """True once decode streams, False when nobody had room in time. Raises as `Attempt.event`."""
        until_s = time.monotonic() + self._wait_s
        while True:
            self._attempt.state = State.HANDOFF_WANTED
            choice = self._choose(frozenset(self._refused | self._silent))
            if isinstance(choice, Claim):
                ticket = await self._reserve(choice)
                if ticket is not None:
                    await self._transfer(choice, ticket)
                    return True
                continue
            now_s = time.monotonic()
            gives_up = self._prefilled() or now_s >= until_s + self._limits.first_token_s
            if now_s >= until_s and gives_up:
                log.info("attempt=%d no decode worker has room: %s", self._attempt.number, choice.why_not())
                return False
            await self._attempt.event(now_s + TICK_S)
            self._refused.clear()

    async def _reserve(self, claim: Claim) -> pb.Ticket | None:
        """None when the worker refuses, fails or does not answer."""
        attempt = self._attempt
        attempt.decode, attempt.state = claim, State.RESERVING
        prefill = self._fleet.member(attempt.prompt_id)
        request = self._submit()
        reserve = pb.Reserve(
            request=request,
            prefill_worker_id=attempt.prompt_id,
            prefill_incarnation=prefill.hello.incarnation if prefill is not None else 0,
        )
        self._send(claim.worker_id, pb.RouterMessage(reserve=reserve))
        answer = await self._answer(claim.worker_id)
        if isinstance(answer, Reserved):
            return answer.ticket
        if isinstance(answer, Failed):
            log.info("request=%s worker=%s gave no ticket: %s", request.request_id, claim.worker_id, answer.reason)
            self._refused.add(claim.worker_id)
        else:
            self._silent.add(claim.worker_id)
        abort = pb.Abort(request_id=request.request_id, attempt=attempt.number)
        self._fleet.send(claim.worker_id, pb.RouterMessage(abort=abort))
        claim.release()
        attempt.decode = None
        return None

    async def _answer(self, worker_id: str) -> Reserved | Failed | None:
        """None when the worker says nothing in time."""
        until_s = time.monotonic() + self._limits.reserve_s
        while (event := await self._attempt.event(until_s)) is not None:
            if isinstance(event, Reserved | Failed) and event.worker_id == worker_id:
                return event
        return None

    async def _transfer(self, claim: Claim, ticket: pb.Ticket) -> None:
        attempt = self._attempt
        attempt.state = State.HANDING_OFF
        decode = self._fleet.member(claim.worker_id)
        limit_s = self._limits.handoff_s(len(ticket.block_ids), decode.hello.block_bytes if decode is not None else 0)
        handoff = pb.Handoff(request_id=self._submit().request_id, attempt=attempt.number, ticket=ticket)
        self._send(attempt.prompt_id, pb.RouterMessage(handoff=handoff))
        until_s = time.monotonic() + limit_s
        while (event := await attempt.event(until_s)) is not None:
            if isinstance(event, DecodeBegan):
                return
        raise AttemptFailed(claim.worker_id, f"no token {limit_s:.1f} s after the hand-over began")

    def _send(self, worker_id: str, message: pb.RouterMessage) -> None:
        if not self._fleet.send(worker_id, message):
            self._attempt.post(Failed(worker_id, "cannot be reached"))
