"""A stub worker that fails on purpose: once, when a request reaches a named phase, or all the time in its stream."""

from __future__ import annotations

import asyncio

from pdserve.protocol import worker_pb2 as pb
from router.bench.stub_worker import Fabric, StubSession, StubSpec, StubWorker


class FaultyWorker(StubWorker):
    """Faults, each at most once: `die_at`, `wedge_at` (this request makes no progress, pings are answered), `freeze_at`
    (nothing leaves any more), `error_at`, `refuse_at`. If `noisy`, stale, doubled and swapped tokens surround each."""

    def __init__(self, spec: StubSpec, fabric: Fabric, *, noisy: bool = False, **at: str) -> None:
        super().__init__(spec, fabric)
        self.at_phase = {phase: kind.removesuffix("_at") for kind, phase in at.items()}
        self.reached: list[str] = []
        self.frozen = False
        self.thawed = asyncio.Event()
        self._noisy = noisy
        self._late: pb.TokenEvent | None = None

    async def at(self, phase: str, session: StubSession, submit: pb.Submit) -> None:
        self.reached.append(phase)
        fault = self.at_phase.pop(phase, None)
        name = {"request_id": submit.request_id, "attempt": submit.attempt}
        if fault == "error":
            event = pb.TokenEvent(**name, finish=pb.ERROR, no_token=True, error="made to fail")
            session.send(step=pb.StepOutput(tokens=[event]))
        elif fault == "refuse":
            session.send(refused=pb.Refused(**name, reason="made to refuse"))
        elif fault == "die":
            self.dying = asyncio.create_task(self.stop())
        elif fault == "freeze":
            self.frozen = True
            await self.thawed.wait()
            return
        elif fault is None:
            return
        await asyncio.Event().wait()  # until the abort

    async def next_message(self, session: StubSession) -> pb.WorkerMessage:
        message = await super().next_message(session)
        if self.frozen:
            await self.thawed.wait()
        return message

    def emit(self, session: StubSession, event: pb.TokenEvent) -> None:
        if not self._noisy:
            super().emit(session, event)
            return
        false = pb.TokenEvent(request_id=event.request_id, index=event.index, token_id=7, finish=pb.STOP)
        for attempt in (event.attempt - 1, event.attempt + 1):
            stale = pb.TokenEvent()
            stale.CopyFrom(false)
            stale.attempt = attempt
            super().emit(session, stale)
        if self._late is None and event.finish == pb.RUNNING and event.index % 3 == 1:
            self._late = event  # after its successor
            return
        super().emit(session, event)
        if self._late is not None:
            super().emit(session, self._late)
            self._late = None
        doubled = pb.TokenEvent(request_id=event.request_id, attempt=event.attempt, index=event.index, token_id=7)
        super().emit(session, doubled)
