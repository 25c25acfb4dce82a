"""The engine: sequences in, tokens out, one step at a time. Knows nothing of text, sockets, roles or transfers.

A step is `schedule` then `execute`; between the two the caller knows which prompts are about to be finished.

Where the runner allows it, `execute` launches the next step before it waits for its own:

    device   | step n               | step n + 1           |
    host       look ahead, launch     read n, report ...

So what `schedule` gives next is under way already. A sequence that turns out to have ended in step n has a row in step
n + 1 for nothing; it keeps its blocks until that is computed, so that nobody else's memory is written to. Nothing but
`schedule` and `execute` may be called while a step is under way (`in_flight`).
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass

from kvstore.keys import root_key
from kvstore.pool import BlockPool, BlockRef
from pdserve.engine.config import EngineConfig
from pdserve.engine.runner import Flight, Runner
from pdserve.engine.sampler import Sampled
from pdserve.engine.scheduler import Plan, Scheduler
from pdserve.engine.sequence import Sequence, Status
from pdserve.request import FinishReason, SamplingParams, TokenLogprobs


@dataclass(frozen=True, slots=True)
class StepToken:
    """One sampled token; with `finish_reason` the sequence has left the scheduler."""

    sequence: Sequence
    token_id: int
    index: int  # among the output tokens of its sequence
    finish_reason: FinishReason | None
    logprobs: TokenLogprobs | None = None  # if asked for


class Engine:
    """Not thread-safe: one thread owns it, its scheduler and its pool."""

    def __init__(self, config: EngineConfig, pool: BlockPool, runner: Runner) -> None:
        self.config = config
        self.pool = pool
        self.scheduler = Scheduler(config, pool)
        self.runner = runner
        self.num_drafted = self.num_accepted = 0  # tokens since start
        self._ahead: Flight | None = None
        self._ended: list[Sequence] = []  # with a row in the step under way

    @property
    def idle(self) -> bool:
        """No sequence that a step could advance."""
        return not self.scheduler.running and not self.scheduler.waiting

    @property
    def in_flight(self) -> bool:
        """A step has been launched and not read: only `schedule` and `execute` may be called."""
        return self._ahead is not None

    def warm_up(self, most_tokens: int | None = None) -> None:
        """Run a prefill chunk and a decode step once: the first request shall not pay for first calls.

        Args:
            most_tokens: of the chunk; None for the largest that there can be.
        """
        length = self.config.max_batched_tokens if most_tokens is None else most_tokens
        length = max(1, min(length, self.config.max_batched_tokens, self.config.max_model_len - 2))
        sequence = Sequence(
            name="warm-up",
            token_ids=array("I", [0]) * length,
            num_prompt_tokens=length,
            sampling=SamplingParams(max_tokens=2, seed=0, temperature=0.0),
            root_key=root_key(b"warm-up"),
            block_size=self.config.block_size,
            arrived_s=0.0,
        )
        self.scheduler.add(sequence)
        while not self.idle:
            self.execute(self.schedule(0.0), 0.0)
        self.pool.clear_cached()
        self.pool.drain_events()
        self.scheduler.drain_committed()

    def schedule(self, now_s: float) -> Plan:
        return self.scheduler.schedule(now_s) if self._ahead is None else self._ahead.plan

    def execute(self, plan: Plan, now_s: float, *, look_ahead: bool = False) -> list[StepToken]:
        """Run the plan, and with `look_ahead` leave the next step under way where that can be foreseen.

        A sequence that ended has left and given its blocks back; one that is `prefill_only`, ended or not, is
        HANDING_OFF, with all its blocks, until the caller has seen to the push and calls `finish`.
        """
        ended, self._ended = self._ended, []
        try:
            sampled = self._compute(plan, ended, look_ahead)
        except Exception:
            self._ahead = None  # its sequences are those of the step that failed
            for sequence in ended:
                self.scheduler.finish(sequence)
            raise
        ready = [chunk for chunk in plan.chunks if chunk.last]
        self.scheduler.commit(plan)
        tokens: list[StepToken] = []
        for chunk, new in zip(ready, sampled, strict=True):
            sequence = chunk.sequence
            if sequence in ended:
                self.scheduler.finish(sequence)
                continue
            reason = self._append(sequence, new, tokens)
            if chunk.draft:
                self.num_drafted += len(chunk.draft)
                self.num_accepted += len(new) - 1
                assert sequence.lookup is not None
                sequence.lookup.learn(len(chunk.draft), len(new) - 1)
            if sequence.prefill_only:
                self.scheduler.hand_off(sequence, now_s + self.config.handoff_s)
            elif reason is not None and self._flies(sequence):
                self._ended.append(sequence)
            elif reason is not None:
                self.scheduler.finish(sequence)
        return tokens

    def _compute(self, plan: Plan, ended: list[Sequence], look_ahead: bool) -> list[list[Sampled]]:
        flight, self._ahead = self._ahead or self.runner.launch(plan), None
        if look_ahead and self.runner.foresees(plan):
            ahead = self.scheduler.look_ahead(plan, ended)
            if ahead is not None:
                self._ahead = self.runner.launch(ahead, flight)
        return self.runner.collect(flight)

    def _flies(self, sequence: Sequence) -> bool:
        return self._ahead is not None and any(chunk.sequence is sequence for chunk in self._ahead.plan.chunks)

    def _append(self, sequence: Sequence, sampled: list[Sampled], into: list[StepToken]) -> FinishReason | None:
        """Tokens of one step, to the first that ends the sequence; those before the newest were a draft's."""
        reason, appended = None, 0
        for new in sampled:
            sequence.token_ids.append(new.token_id)
            appended += 1
            reason = sequence.finish_reason(self.config.max_model_len)
            into.append(StepToken(sequence, new.token_id, sequence.num_output_tokens - 1, reason, new.logprobs))
            if reason is not None:
                break
        if appended > 1:
            self.scheduler.accept(sequence, appended - 1)
        return reason

    def finish(self, sequence: Sequence) -> list[BlockRef]:
        """Take a sequence out and give its blocks back, whatever it was doing. Idempotent.

        Returns blocks that went into quarantine, because a peer may still write to them.
        """
        return self.scheduler.finish(sequence) if sequence.status is not Status.FINISHED else []
