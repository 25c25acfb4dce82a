"""On a public conversation trace the cost policy finds nearly all prefixes and still spreads the work evenly."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pdserve.trace import read_trace
from router.policy import POLICIES, Speed
from router.replay.outcome import Outcome
from router.replay.run import Replay
from router.replay.setting import Setting, arrivals
from router.slo import CLASSES, STANDARD

TRACES = Path(__file__).parents[4] / "shared" / "traces"
CONVERSATION = TRACES / "conversation_trace.jsonl.gz"
NO_QUEUES = 1e6  # prompt tokens/s of a worker: as the idealised figures of others

needs_traces = pytest.mark.skipif(
    not TRACES.exists() and os.environ.get("CI") != "true", reason=f"{TRACES} is not beside the project"
)


def replay(policy: str, prefill_tokens_per_s: float, workers: int = 16, max_rows: int | None = None) -> Outcome:
    trace = read_trace(CONVERSATION, max_rows)
    speed = Speed(prefill_tokens_per_s=((1, prefill_tokens_per_s),))
    setting = Setting(workers, trace.block_tokens, 1_000_000, speed, CLASSES[STANDARD].objectives)
    return Replay(POLICIES[policy], setting).run(arrivals(trace, seed=1))


@needs_traces
def test_cost_finds_prefixes_and_balances() -> None:
    found, blind = replay("cost", NO_QUEUES), replay("round_robin", NO_QUEUES)
    assert found.hit_ratio >= 0.32
    assert found.imbalance <= 1.05
    assert found.hit_ratio > 4 * blind.hit_ratio


@needs_traces
def test_cost_still_does_where_prompts_queue() -> None:
    found, blind = replay("cost", 10_000.0), replay("least_load", 10_000.0)
    assert found.hit_ratio >= 0.31
    assert found.imbalance <= 1.05
    assert found.good_ratio > blind.good_ratio
    assert found.ttft_p50_s < 0.8 * blind.ttft_p50_s


@needs_traces
def test_prefix_only_sends_all_to_one_worker() -> None:
    assert replay("prefix_only", NO_QUEUES, max_rows=2_000).imbalance > 15.0
