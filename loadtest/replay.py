"""A trace as a workload: scaled in time to the rate that is asked for, and in length to what the target can do."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass

from loadtest.session import Session, Turn
from loadtest.workload import tokens
from pdserve.trace import Row, Trace


@dataclass(frozen=True, slots=True)
class Replay:
    """Rows in their order and, over again, with new prompts when the trace is at its end.

    Attributes:
        length_scale: of prompts, answers and prefix blocks alike, so the share of prefix hits stays as it was.
        max_prompt_tokens, max_output_tokens: after scaling; what is longer is cut.
    """

    trace: Trace
    length_scale: float = 1.0
    max_prompt_tokens: int = 1536
    max_output_tokens: int = 256

    @property
    def name(self) -> str:
        return f"{self.trace.name}, lengths x {self.length_scale:g}"

    def sessions(self, rate_rps: float, seed: int) -> Iterator[Session]:
        """Timestamps that stand on a grid are spread evenly over its step; then time runs so that the mean rate is
        `rate_rps`."""
        rng = random.Random(f"{self.name} {seed}")
        trace, speed = self.trace, rate_rps / self.trace.rate_rps
        for lap in itertools.count():
            spread = sorted(
                ((row.at_s + rng.uniform(0.0, trace.grid_s), row) for row in trace.rows), key=lambda pair: pair[0]
            )
            lap_start_s = lap * len(trace.rows) / rate_rps
            for at_s, row in spread:
                yield Session(lap_start_s + at_s / speed, (self._turn(row, f"{seed} {lap}", rng),))

    def _turn(self, row: Row, salt: str, rng: random.Random) -> Turn:
        length = _scaled(row.prompt_tokens, self.length_scale, self.max_prompt_tokens)
        prompt: list[int] = []
        for number, block in enumerate(row.blocks, start=1):
            if len(prompt) >= length:
                break
            # From the block's end in the whole prompt, so that small blocks keep their share too.
            end = round(number * self.trace.block_tokens * self.length_scale)
            prompt += tokens(random.Random(f"{salt} {block}"), end - len(prompt))
        prompt += tokens(rng, max(0, length - len(prompt)))
        return Turn(tuple(prompt[:length]), _scaled(row.output_tokens, self.length_scale, self.max_output_tokens))


def _scaled(value: int, scale: float, most: int) -> int:
    return max(1, min(most, round(value * scale)))
