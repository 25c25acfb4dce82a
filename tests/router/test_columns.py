"""The columns that the fleet keeps say what the records of its workers say, whatever changed in which order."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.columns import Columns, Seats
from router.index import Match
from router.policy import POLICIES, Candidate, Candidates, LoadView, Need, Phase, Role, Speed
from router.policy.candidates import WAITING_TOKENS
from router.policy.rates import Rates

NOTHING_HELD = Match([])
loads = st.builds(
    LoadView,
    waiting_tokens=st.integers(0, 100_000),
    sequences=st.integers(0, 9),
    context_tokens=st.integers(0, 10_000),
    free_blocks=st.integers(0, 200),
)
some_rates = st.dictionaries(st.integers(1, 20), st.floats(1.0, 1e5), max_size=5)
speeds = st.builds(Speed, prefill_tokens_per_s=some_rates.map(lambda found: tuple(sorted(found.items()))))


def worker(slot: int, **changes: object) -> Candidate:
    base = Candidate(f"w{slot:03d}", Role.MIXED, True, "", 1 << 20, 8, 100, 1 << 18)
    return replace(base, **changes)  # type: ignore[arg-type]


@given(speeds, st.one_of(st.integers(0, 2**21), st.floats(0.0, 2.0**21)))
def test_the_table_of_rates_gives_the_time_that_the_speed_gives(speed: Speed, tokens: float) -> None:
    rates = Rates.of([Speed(), speed])
    expected = [Speed().prefill_s(tokens), speed.prefill_s(tokens)]
    assert rates.seconds(np.full(2, float(tokens))).tolist() == expected
    if isinstance(tokens, int):
        assert rates.constant(tokens).tolist() == expected


@given(st.lists(st.tuples(loads, speeds, st.integers(0, 40)), min_size=1, max_size=6), st.integers(0, 9))
def test_a_decision_from_columns_is_the_one_from_records(facts: list[tuple[LoadView, Speed, int]], turn: int) -> None:
    columns, runs = Columns(), []
    slots = [(7 * number) % 97 for number in range(len(facts))]  # neither dense nor in order
    for slot, (load, speed, matched_blocks) in zip(slots, facts, strict=True):
        columns.reset(slot)
        columns.set_load(slot, load)
        columns.set_speed(slot, speed)
        runs.append((1 << slot, matched_blocks))
    seats = Seats.of([(slot, worker(slot)) for slot in slots])
    records = [
        worker(slot, load=load, speed=speed, matched_blocks=matched_blocks)
        for slot, (load, speed, matched_blocks) in zip(slots, facts, strict=True)
    ]
    need = Need(Phase.PROMPT, tokens=640, max_tokens=16, block_size=16)
    kept = POLICIES["cost"].decide(need, columns.candidates(seats, Match(runs), 1.0), turn)
    built = POLICIES["cost"].decide(need, Candidates.of(records), turn)
    assert kept.considered == built.considered
    assert (kept.worker_id, kept.runner_up) == (built.worker_id, built.runner_up)


changes = st.one_of(
    st.tuples(st.just("load"), loads),
    st.tuples(st.just("waiting"), st.integers(0, 50_000)),
    st.tuples(st.just("speed"), speeds),
    st.tuples(st.just("reset"), st.none()),
    st.tuples(st.just("decide"), st.none()),
)


@given(st.lists(st.tuples(st.integers(0, 2), changes), max_size=20))
def test_what_waits_is_right_in_seconds_whatever_changed_in_which_order(
    history: list[tuple[int, tuple[str, object]]],
) -> None:
    columns, seats = Columns(), Seats.of([(slot, worker(slot)) for slot in (2, 0, 1)])
    truth = {slot: (0, Speed()) for slot in range(3)}
    for slot, (kind, value) in [*history, (0, ("decide", None))]:
        waiting_tokens, speed = truth[slot]
        match value:
            case LoadView():
                columns.set_load(slot, value)
                waiting_tokens = value.waiting_tokens
            case Speed():
                columns.set_speed(slot, value)
                speed = value
            case int():
                columns.change_load(slot, WAITING_TOKENS, value)
                waiting_tokens += value
        if kind == "reset":
            columns.reset(slot)
            waiting_tokens, speed = 0, Speed()
        truth[slot] = waiting_tokens, speed
        if kind == "decide":
            queued_s = columns.candidates(seats, NOTHING_HELD, 1.0).queued_s.tolist()
            assert queued_s == [speed.prefill_s(waiting) for waiting, speed in truth.values()]


def test_a_decision_stays_explained_as_it_was_made() -> None:
    columns, seats = Columns(), Seats.of([(0, worker(0)), (1, worker(1))])
    columns.set_load(1, LoadView(waiting_tokens=50))
    candidates = columns.candidates(seats, NOTHING_HELD, 1.0)
    decision = POLICIES["cost"].decide(Need(Phase.PROMPT, 64, 16, 16), candidates, 0)
    before = decision.considered
    columns.set_load(0, LoadView(waiting_tokens=10_000))
    columns.add_recent(1, 5_000.0, 2.0)
    columns.set_speed(1, Speed(prefill_tokens_per_s=((7, 1.0),)))
    assert decision.considered == before
    assert decision.worker_id == "w000"


def test_recent_tokens_halve_with_each_half_life_and_survive_reports() -> None:
    columns, seats = Columns(), Seats.of([(3, worker(3))])
    columns.add_recent(3, 100.0, 10.0)
    columns.add_recent(3, 100.0, 40.0)
    columns.set_load(3, LoadView(waiting_tokens=1))

    def recent_tokens(now_s: float) -> float:
        return float(columns.candidates(seats, NOTHING_HELD, now_s).seen.recent_tokens[0])

    assert recent_tokens(40.0) == pytest.approx(150.0)
    assert recent_tokens(100.0) == pytest.approx(37.5)
    assert recent_tokens(90.0) == pytest.approx(37.5)  # a clock that is read twice may seem to go back
    columns.reset(3)
    assert recent_tokens(100.0) == 0.0


def test_more_workers_than_there_was_room_for_at_first() -> None:
    columns = Columns()
    for slot in range(200):
        columns.reset(slot)
    columns.set_load(199, LoadView(free_blocks=7))
    seats = Seats.of([(slot, worker(slot)) for slot in range(200)])
    seen = columns.candidates(seats, Match([(1 << 199 | 1 << 4, 9), (1 << 70, 2)]), 1.0).seen
    assert seen.free_blocks[199] == 7
    held = {at: int(blocks) for at, blocks in enumerate(seen.matched_blocks) if blocks}
    assert held == {4: 9, 70: 2, 199: 9}
