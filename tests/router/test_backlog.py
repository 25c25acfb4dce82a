"""What a worker still has to compute follows what was sent and what came back, and batching is noticed."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given

from router.backlog import Backlog

USUAL = 1000.0


def test_it_runs_down_with_time_and_is_set_right_by_a_first_token() -> None:
    backlog = Backlog()
    assert backlog.seconds(0.0, USUAL) == 0.0
    first = backlog.sent(1000, 0.0)
    backlog.sent(500, 0.2)
    assert backlog.seconds(0.5, USUAL) == pytest.approx(1.0)
    assert backlog.seconds(5.0, USUAL) == pytest.approx(0.5)  # the first takes longer, the other still waits
    backlog.computed(first, 2.0)
    assert backlog.seconds(2.0, USUAL) == pytest.approx(1.0)  # at the 500 tokens/s that were seen
    assert backlog.tokens == 500


@pytest.mark.parametrize(("tokens", "seconds"), [(100, 0.1), (10, 1.0)])
def test_prompts_of_one_step_are_seen_to_drain_together(tokens: int, seconds: float) -> None:
    """Also those of which one alone would say nothing."""
    backlog = Backlog()
    for round_s in range(10):
        tickets = [backlog.sent(tokens, float(round_s)) for _ in range(4)]
        for ticket in tickets:
            backlog.computed(ticket, round_s + 0.1)
    backlog.sent(400, 20.0)
    assert backlog.seconds(20.0, USUAL) == pytest.approx(seconds)


def test_prompts_that_are_all_but_cached_do_not_make_long_ones_look_slow() -> None:
    backlog = Backlog()
    for round_s in range(40):
        backlog.computed(backlog.sent(1, float(round_s)), round_s + 0.02)
    backlog.sent(1000, 50.0)
    assert backlog.seconds(50.0, USUAL) == pytest.approx(1.0), "and not 20"


def test_what_was_dropped_teaches_nothing_and_holds_up_nobody() -> None:
    backlog = Backlog()
    first, second = backlog.sent(1000, 0.0), backlog.sent(100, 0.0)
    backlog.dropped(first, 0.1)
    backlog.dropped(first, 0.2)
    assert backlog.seconds(0.1, USUAL) == pytest.approx(0.1)
    backlog.dropped(second, 0.3)
    assert backlog.seconds(0.3, USUAL, more_tokens=100) == pytest.approx(0.1)


@given(st.lists(st.tuples(st.sampled_from(["send", "compute", "drop"]), st.integers(0, 9), st.floats(0.0, 1.0))))
def test_it_is_never_negative_and_empty_when_all_have_left(steps: list[tuple[str, int, float]]) -> None:
    backlog, tickets, now_s = Backlog(), [], 0.0
    for what, number, passed_s in steps:
        now_s += passed_s
        if what == "send":
            tickets.append(backlog.sent(1 + 100 * number, now_s))
        elif tickets:
            ticket = tickets.pop(number % len(tickets))
            (backlog.computed if what == "compute" else backlog.dropped)(ticket, now_s)
        assert backlog.seconds(now_s, USUAL) >= 0.0
        assert (backlog.tokens == 0) == (not tickets)
    for ticket in tickets:
        backlog.dropped(ticket, now_s)
    assert backlog.tokens == 0
    assert backlog.seconds(now_s, USUAL) == 0.0
