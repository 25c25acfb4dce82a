"""What is replayed: arrivals out of a trace, and the workers and routers that they meet."""

from __future__ import annotations

import random
from dataclasses import dataclass

from kvstore.keys import BlockKey
from pdserve.slo import Slo
from pdserve.trace import Trace
from router.policy import Speed

REPORT_S = 0.1  # as workers do while they are busy


@dataclass(frozen=True, slots=True)
class Arrival:
    at_s: float
    prompt_tokens: int
    output_tokens: int
    keys: tuple[BlockKey, ...]
    session: str | None = None


@dataclass(frozen=True, slots=True)
class Outage:
    """A worker dies and joins again, empty."""

    worker: int
    from_s: float
    until_s: float


@dataclass(frozen=True, slots=True)
class Setting:
    workers: int
    block_tokens: int
    tokens_per_worker: int  # that its cache holds
    speed: Speed
    slo: Slo
    outages: tuple[Outage, ...] = ()
    token_bytes: int = 0  # of KV: hot prefixes are copied out of a store's host tier; 0: there is no store
    routers: int = 1  # arrivals fall on them at random
    report_s: float = REPORT_S  # workers tell what they hold and do so often
    seed: int = 0  # of which router an arrival falls on


def arrivals(trace: Trace, speedup: float = 1.0, seed: int = 0) -> list[Arrival]:
    """The rows of a trace, `speedup` times as fast; times on a grid are spread evenly over its step."""
    draw = random.Random(seed)
    known: dict[int, BlockKey] = {}
    found = [
        Arrival(
            (row.at_s + draw.uniform(0.0, trace.grid_s)) / speedup,
            row.prompt_tokens,
            row.output_tokens,
            tuple(known.setdefault(block, BlockKey(block.to_bytes(16, "big"))) for block in row.blocks),
        )
        for row in trace.rows
    ]
    return sorted(found, key=lambda arrival: arrival.at_s)
