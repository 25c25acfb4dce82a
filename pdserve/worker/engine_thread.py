"""The engine's thread: runs commands between steps, and steps while there is work.

Everything that touches the pool or the scheduler happens here, as a function posted from outside. Results go back to
the asyncio loop, one call per step.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

from kvstore.pool import PoolEvents
from pdserve.engine.engine import Engine, StepToken
from pdserve.engine.scheduler import Committed, Plan
from pdserve.engine.sequence import Sequence

T = TypeVar("T")
Command = Callable[[Engine, float], object]  # what it returns is dropped

log = logging.getLogger(__name__)

_NAME = "engine"
_EMPTY_PLAN_WAIT_S = 0.25  # blocks are all in transit: only a command can help, but look at deadlines now and then
_MAX_FAILED_STEPS = 3


@dataclass(frozen=True, slots=True)
class Computed:
    """Blocks, from the first on, of a sequence to be handed over whose KV is complete."""

    sequence: Sequence
    block_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Load:
    waiting_sequences: int
    running_sequences: int
    waiting_tokens: int  # of prompts, not yet computed
    context_tokens: int  # read by a decode step
    available_blocks: int
    preempted: int  # since start
    drafted: int = 0  # tokens, since start
    accepted: int = 0


@dataclass(frozen=True, slots=True)
class StepReport:
    """What one step, or commands between steps, changed."""

    tokens: tuple[StepToken, ...]
    computed: tuple[Computed, ...]  # prompts now complete, to be handed over
    failed: tuple[Sequence, ...]  # a bug of ours: their step raised
    events: PoolEvents
    committed: tuple[Committed, ...]  # for the store
    load: Load
    num_tokens: int  # computed in the step; 0 if there was none
    prefill_tokens: int  # the same if all of them were of prompts, else 0
    step_s: float


class Listener(Protocol):
    """Called on the asyncio loop, in order."""

    def on_last_chunks(self, computed: list[Computed]) -> None:
        """The last chunk of these prompts is about to be computed; the blocks before it are ready."""
        ...

    def on_step(self, report: StepReport) -> None: ...


def end_process_in_a_step() -> None:
    """Ends this process with code 0 if a step still runs; to be called last. The thread that runs it comes back from
    C++ code, and an interpreter that has ended would make that an abort."""
    if any(thread.name == _NAME for thread in threading.enumerate()):
        logging.shutdown()
        os._exit(0)


class EngineThread:
    """`post` and `ask` may be called from any thread; `ask` from the loop only."""

    def __init__(self, engine: Engine, loop: asyncio.AbstractEventLoop) -> None:
        self._engine = engine
        self._loop = loop
        self._commands: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self._step_began_s: float | None = None
        self._failed_steps = 0
        self.died = asyncio.Event()
        self._thread = threading.Thread(target=self._main, name=_NAME, daemon=True)
        self._listener: Listener

    def start(self, listener: Listener) -> None:
        self._listener = listener
        self._thread.start()

    async def stop(self, timeout_s: float) -> None:
        """Ends after the step in progress."""
        self._commands.put(None)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self.died.wait()

    def post(self, command: Command) -> None:
        """Run `command(engine, now_s)` before the next step."""
        self._commands.put(command)

    def tell(self, question: Callable[[Engine, float], T], listener: Callable[[T], None]) -> None:
        """Like `post`; what it returns goes to `listener` on the loop, in order with the reports of steps."""
        self._commands.put(lambda engine, now_s: self._call(listener, question(engine, now_s)))

    def ask(self, question: Callable[[Engine, float], T]) -> asyncio.Future[T]:
        """Like `post`, with the result or the exception as a future; its callbacks may run after the next report's."""
        future: asyncio.Future[T] = self._loop.create_future()

        def settle(result: T | None, error: Exception | None) -> None:
            if future.done():
                return
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(result)  # type: ignore[arg-type]

        def command(engine: Engine, now_s: float) -> None:
            try:
                result = question(engine, now_s)
            except Exception as error:
                self._call(settle, None, error)
            else:
                self._call(settle, result, None)

        self._commands.put(command)
        return future

    def stalled_s(self, now_s: float) -> float:
        """How long the step in progress has been running; 0 between steps."""
        began = self._step_began_s
        return 0.0 if began is None else now_s - began

    # --- on the thread -----------------------------------------------------------------------------------------------

    def _main(self) -> None:
        try:
            self._run()
        except Exception:
            log.critical("the engine thread died", exc_info=True)
        finally:
            self._call(self.died.set)

    def _run(self) -> None:
        self._engine.runner.enter_thread()
        stuck = False
        while True:
            if self._engine.in_flight:
                self._step(self._engine.schedule(time.monotonic()))
                continue
            ran = self._run_commands(wait_s=None if self._engine.idle else _EMPTY_PLAN_WAIT_S if stuck else 0.0)
            if ran is None:
                return
            plan = self._engine.schedule(time.monotonic())
            stuck = not plan.chunks
            if plan.chunks:
                self._step(plan)
            elif ran:
                self._report((), (), (), plan, 0.0)

    def _run_commands(self, wait_s: float | None) -> int | None:
        """Run all commands there are, waiting for a first one at most `wait_s`; None means stop."""
        ran = 0
        try:
            command = self._commands.get(wait_s != 0.0, wait_s or None)
            while True:
                if command is None:
                    return None
                command(self._engine, time.monotonic())
                ran += 1
                command = self._commands.get_nowait()
        except queue.Empty:
            return ran

    def _step(self, plan: Plan) -> None:
        block_size = self._engine.config.block_size
        last = [
            Computed(c.sequence, tuple(c.sequence.block_ids[: c.sequence.num_computed // block_size]))
            for c in plan.chunks
            if c.last and c.sequence.prefill_only
        ]
        if last:
            self._call(self._listener.on_last_chunks, last)
        self._step_began_s = began_s = time.monotonic()
        try:
            # A command waits for one step more at most: it finds nothing under way.
            tokens = self._engine.execute(plan, began_s, look_ahead=self._commands.empty())
        except Exception:
            log.exception("a step failed; its %d sequences end with an error", len(plan.chunks))
            failed = tuple(chunk.sequence for chunk in plan.chunks)
            for sequence in failed:
                self._take_out(sequence)
            self._failed_steps += 1
            if self._failed_steps >= _MAX_FAILED_STEPS:
                raise
            self._report((), (), failed, Plan(()), 0.0)
            return
        finally:
            self._step_began_s = None
        self._failed_steps = 0
        computed = tuple(
            Computed(token.sequence, tuple(token.sequence.block_ids)) for token in tokens if token.sequence.prefill_only
        )
        self._report(tuple(tokens), computed, (), plan, time.monotonic() - began_s)

    def _take_out(self, sequence: Sequence) -> None:
        """No step has it any more. A push may be reading its blocks: they are given back when that has drained."""
        if sequence.prefill_only:
            self._engine.scheduler.hand_off(sequence, time.monotonic() + self._engine.config.handoff_s)
        else:
            self._engine.finish(sequence)

    def _report(
        self,
        tokens: tuple[StepToken, ...],
        computed: tuple[Computed, ...],
        failed: tuple[Sequence, ...],
        plan: Plan,
        step_s: float,
    ) -> None:
        report = StepReport(
            tokens=tokens,
            computed=computed,
            failed=failed,
            events=self._engine.pool.drain_events(),
            committed=self._engine.scheduler.drain_committed(),
            load=self._load(),
            num_tokens=plan.num_tokens,
            prefill_tokens=plan.num_tokens if all(chunk.num_tokens > 1 for chunk in plan.chunks) else 0,
            step_s=step_s,
        )
        self._call(self._listener.on_step, report)

    def _load(self) -> Load:
        scheduler = self._engine.scheduler
        prompts = [*scheduler.waiting, *(s for s in scheduler.running if not s.decoding)]
        return Load(
            waiting_sequences=len(scheduler.waiting),
            running_sequences=len(scheduler.running) + len(scheduler.arriving),
            waiting_tokens=sum(s.num_uncomputed for s in prompts),
            context_tokens=sum(s.num_computed for s in scheduler.running if s.decoding),
            available_blocks=self._engine.pool.num_available,
            preempted=scheduler.num_preempted,
            drafted=self._engine.num_drafted,
            accepted=self._engine.num_accepted,
        )

    def _call(self, function: Callable[..., None], *args: object) -> None:
        # The loop may be gone while the process ends; nobody is left to tell then.
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, *args)
