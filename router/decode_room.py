"""How many sequences a decode batch may hold within a TPOT, and how many it holds already. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from router.member import Member
from router.policy import Role
from router.step_model import StepModel


@dataclass(frozen=True, slots=True)
class DecodeRoom:
    """Of the workers that would decode a request.

    Attributes:
        sequences: in all their batches, those that are on the way to them included.
        context_each: tokens of KV that a step reads for one of them.
        factor: what the model's steps are multiplied by.
    """

    workers: int
    sequences: int
    max_sequences: int  # of one
    context_each: float
    model: StepModel
    factor: float

    def places(self, tpot_s: float) -> float:
        """Sequences whose steps take at most `tpot_s`. If not even one would, only the workers' own limit counts."""
        largest = self.model.largest_batch(tpot_s / self.factor, self.context_each)
        return self.workers * (min(self.max_sequences, largest) if largest >= 1.0 else self.max_sequences)

    def has_place(self, tpot_s: float) -> bool:
        """An idle fleet has one for anybody."""
        return self.sequences < self.workers or self.sequences + 1 <= self.places(tpot_s)

    def sequences_after(self, passed_s: float, ahead: int, stay_s: float) -> float:
        """With one more, which comes when `ahead` others have come within `passed_s`; each stays for `stay_s`.

        What comes evenly and leaves after a mean stay tends to rate times stay, by the exponential of the time.
        """
        if passed_s <= 0.0 or stay_s <= 0.0:
            return self.sequences + ahead + 1
        settled = ahead / passed_s * stay_s
        return settled + (self.sequences - settled) * math.exp(-passed_s / stay_s) + 1

    def wait_s(self, tpot_s: float, sequences: float, stay_s: float) -> float:
        """Until one of so many sequences has a place; each stays for `stay_s`."""
        places = self.places(tpot_s)
        return max(0.0, sequences - places) * stay_s / places

    def tpot_s(self, tpot_s: float, sequences: float) -> float:
        """A step of batches of so many sequences in all, given that none is let beyond `tpot_s`."""
        batch = max(1.0, min(sequences, self.places(tpot_s)) / self.workers)
        return self.factor * self.model.step_s(batch, batch * self.context_each)


def decode_room(members: Sequence[Member], chosen: Member, factor: float) -> DecodeRoom:
    """For a request whose prompt goes to `chosen`; `members` are all that are in use."""
    decoders = [each for each in members if each.role is Role.DECODE]
    if chosen.role is not Role.PREFILL or not decoders:
        decoders = [chosen]
        on_the_way = 0
    else:
        on_the_way = sum([each.sequences for each in members if each.role is Role.PREFILL])
    running = sum([each.load.running_sequences for each in decoders])
    context = sum([each.load.context_tokens for each in decoders])
    measured = max(decoders, key=lambda each: each.steps.count) if len(decoders) > 1 else decoders[0]
    return DecodeRoom(
        workers=len(decoders),
        sequences=on_the_way + sum([each.busy_sequences for each in decoders]),
        max_sequences=min([each.hello.max_sequences for each in decoders]),
        context_each=context / running if running else 0.0,
        model=measured.steps.model,
        factor=factor,
    )
