"""A request skips its hand-over exactly when that is predicted to cost everybody less; and its answer is the same."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdserve.timeline import Timeline
from router.policy import POLICIES, Candidate, LoadView, Need, Phase, Role, Speed
from router.policy.candidates import Candidates
from router.policy.decision import Considered
from router.policy.local import skips_handoff
from router.predictor import Predictor
from tests.router.test_dispatch import stubs
from tests.support.stub_cluster import GREEDY, StubCluster, assert_exact, until

HANDOFF_S = 0.02
RATE = 1000.0  # tokens/s
SPEED = Speed(prefill_tokens_per_s=((8, RATE),))
NEED = Need(Phase.LOCAL, tokens=1000, max_tokens=10, block_size=10)


def considered(need: Need, **changes: object) -> Considered:
    """The one worker that there is, on which the request may run."""
    role = Role.DECODE if need.phase is Phase.LOCAL else Role.PREFILL
    base = Candidate("w", role, True, "", 4096, 8, 500, 1000, LoadView(free_blocks=500), SPEED, partners=1)
    worker = replace(base, **changes)  # type: ignore[arg-type]
    decision = POLICIES["cost"].decide(need, Candidates.of([worker]), 0)
    assert decision.chosen is not None, decision.why_not()
    return decision.chosen


def choice(uncached: int, sequences: int, *, elsewhere_uncached: int | None = None, waiting: int = 0) -> bool:
    """On a decode worker with so much left to compute beside so many sequences, against a prefill worker."""
    load = LoadView(free_blocks=500, sequences=sequences)
    here = considered(NEED, matched_blocks=(1000 - uncached) // 10, load=load)
    left = uncached if elsewhere_uncached is None else elsewhere_uncached
    there_load = LoadView(free_blocks=500, waiting_tokens=waiting)
    there = considered(replace(NEED, phase=Phase.PROMPT), matched_blocks=(1000 - left) // 10, load=there_load)
    return skips_handoff(there, here, HANDOFF_S)


def test_little_to_compute_on_an_idle_worker_is_computed_there() -> None:
    assert choice(10, 0)


def test_nobody_is_held_up_for_longer_than_a_handoff_takes() -> None:
    assert choice(20, 0)
    assert not choice(30, 0)
    assert not choice(30, 0, waiting=100_000), "a queue for prefill does not open decode workers to prompts"


def test_what_many_would_wait_counts_in_sum() -> None:
    assert choice(10, 1)
    assert not choice(10, 2), "10 ms each for two is what the hand-over takes"
    assert choice(10, 2, elsewhere_uncached=500), "unless computing it elsewhere takes this request longer"


def test_it_needs_room_and_the_role() -> None:
    full = Candidate("w", Role.DECODE, True, "", 4096, 8, 500, 1000, LoadView(free_blocks=50), SPEED)
    assert POLICIES["cost"].decide(NEED, Candidates.of([full]), 0).chosen is None
    for role in (Role.PREFILL, Role.MIXED):
        other = replace(full, role=role, load=LoadView(free_blocks=500))
        assert POLICIES["cost"].decide(NEED, Candidates.of([other]), 0).chosen is None


@given(st.integers(1, 100), st.integers(0, 7), st.integers(1, 100))
def test_more_work_or_more_neighbours_never_turn_a_no_into_a_yes(blocks: int, sequences: int, elsewhere: int) -> None:
    uncached, there = 10 * blocks, 10 * elsewhere
    if not choice(uncached, sequences, elsewhere_uncached=there):
        if uncached < 1000:
            assert not choice(uncached + 10, sequences, elsewhere_uncached=there)
        assert not choice(uncached, sequences + 1 if sequences < 7 else 7, elsewhere_uncached=there)


def timeline(first_gap_s: float, step_s: float, output_tokens: int = 11) -> Timeline:
    """Of a request whose first gap was a hand-over's."""
    made = Timeline(received_s=0.0, tokenised_s=0.0, dispatched_s=0.0)
    made.first_token_s, made.second_token_s = 1.0, 1.0 + first_gap_s
    made.last_token_s = made.second_token_s + step_s * (output_tokens - 2)
    made.output_tokens = output_tokens
    made.reported.update(reserve=first_gap_s / 4, transfer=first_gap_s / 4, commit=0.0)
    return made


def test_what_a_handoff_costs_is_the_first_gap_less_a_step() -> None:
    predictor = Predictor()
    for _ in range(7):
        predictor.note(None, timeline(0.05, 0.01))
    assert predictor.handoff_s is None, "too few to say"
    predictor.note(None, timeline(5.0, 0.01))  # an outlier
    assert predictor.handoff_s == pytest.approx(0.04)
    local = timeline(0.05, 0.01)
    local.reported.clear()
    for _ in range(100):
        predictor.note(None, local)
    assert predictor.handoff_s == pytest.approx(0.04), "a request without a hand-over says nothing about it"


@pytest.mark.parametrize("skips", [True, False])
async def test_a_following_turn_stays_where_the_answer_was_made(skips: bool) -> None:
    prefill, decode = stubs("p0", "d0")
    async with StubCluster(prefill, decode, policy="cost", skips_handoffs=skips) as cluster:
        cluster.dispatcher.account.predictor.handoff_s = HANDOFF_S
        first = cluster.start(GREEDY, prompt_tokens=640)
        await assert_exact(first)
        assert first.workers == ["p0", "d0"], "the whole prompt is too much for a decode worker"
        await until(lambda: len(cluster.fleet.index) >= 40)
        again = cluster.start(GREEDY, prompt_tokens=641)
        await assert_exact(again)
        assert again.workers == (["d0"] if skips else ["p0", "d0"])
        record = cluster.dispatcher.account.records.find(again.request.request_id)
        assert record is not None
        assert [each.phase for each in record.decisions] == ([Phase.LOCAL] if skips else [Phase.PROMPT, Phase.DECODE])


async def test_without_a_measured_handoff_none_is_skipped() -> None:
    async with StubCluster(*stubs("p0", "d0"), policy="cost", skips_handoffs=True) as cluster:
        for _ in range(2):
            generation = cluster.start(GREEDY, prompt_tokens=64)
            await assert_exact(generation)
            assert generation.workers == ["p0", "d0"]
