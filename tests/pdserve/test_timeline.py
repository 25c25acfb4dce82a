"""The stages of TTFT sum to TTFT and those of the hand-over to the first gap, whatever workers report."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdserve.timeline import HANDOFF_STAGES, TTFT_STAGES, Timeline

# A peer may send any double.
REPORTED = st.dictionaries(
    st.sampled_from(("queue", "compute", "reserve", "transfer", "commit", "unknown")), st.floats() | st.floats(0, 10)
)
GAP_S = st.floats(0, 1e6)


def exactly(value: float) -> object:
    return pytest.approx(value, rel=1e-9, abs=1e-9)


@given(st.floats(-1e6, 1e6), st.none() | GAP_S, st.none() | GAP_S, GAP_S, GAP_S, REPORTED)
def test_stages_sum_to_what_was_measured_and_none_is_negative(
    received_s: float,
    tokenise_s: float | None,
    route_s: float | None,
    first_s: float,
    second_s: float,
    reported: dict[str, float],
) -> None:
    timeline = Timeline(received_s, reported=reported)
    now_s = received_s
    if tokenise_s is not None:
        timeline.tokenised_s = now_s = now_s + tokenise_s
    if route_s is not None:
        timeline.dispatched_s = now_s = now_s + route_s
    now_s += first_s
    timeline.token(now_s)
    timeline.token(now_s + second_s)
    assert timeline.first_token_s is not None
    assert timeline.second_token_s is not None
    ttft, handoff = timeline.ttft_stages(), timeline.handoff_stages()
    assert tuple(ttft) == TTFT_STAGES
    assert tuple(handoff) == (HANDOFF_STAGES if "transfer" in reported else ())
    assert sum(ttft.values()) == exactly(timeline.ttft_s or 0.0)
    if handoff:
        assert sum(handoff.values()) == exactly(timeline.second_token_s - timeline.first_token_s)
    assert all(stage_s >= 0 for stage_s in (*ttft.values(), *handoff.values()))


def test_reported_stages_that_fit_are_kept_and_the_rest_is_the_routers_own() -> None:
    timeline = Timeline(
        10.0, tokenised_s=10.5, queued_s=10.625, dispatched_s=11.0, reported={"queue": 0.25, "compute": 2.0}
    )
    timeline.token(14.0)
    assert timeline.ttft_stages() == exactly(
        {"tokenise": 0.5, "route": 0.125, "wait": 0.375, "fetch": 0.0, "queue": 0.25, "compute": 2.0, "deliver": 0.75}
    )


def test_part_of_the_handover_before_the_first_token_has_not_delayed_the_second() -> None:
    timeline = Timeline(0.0, reported={"reserve": 0.5, "transfer": 2.0, "commit": 0.5})
    timeline.token(10.0)
    timeline.token(11.5)
    assert timeline.handoff_stages() == exactly({"reserve": 0.0, "transfer": 1.0, "commit": 0.5, "resume": 0.0})


@pytest.mark.parametrize("value", [math.nan, -math.inf, -1.0, 0.0, -0.0])
def test_reported_nonsense_counts_as_nothing(value: float) -> None:
    timeline = Timeline(0.0, reported={"compute": value, "queue": 1.0})
    timeline.token(4.0)
    assert timeline.ttft_stages() == exactly(
        {"tokenise": 0.0, "route": 0.0, "wait": 0.0, "fetch": 0.0, "queue": 1.0, "compute": 0.0, "deliver": 3.0}
    )


def test_endless_reported_stage_is_cut_to_what_was_measured() -> None:
    timeline = Timeline(0.0, reported={"queue": math.inf, "compute": 1.0})
    timeline.token(4.0)
    assert timeline.ttft_stages()["queue"] == 3.0


def test_nothing_is_known_before_the_first_token() -> None:
    timeline = Timeline(0.0)
    timeline.token(1.0, count=0)
    assert (timeline.ttft_s, timeline.tpot_s, timeline.ttft_stages(), timeline.handoff_stages()) == (None, None, {}, {})
    timeline.token(1.0)
    assert (timeline.ttft_s, timeline.tpot_s, timeline.handoff_stages()) == (1.0, None, {})


def test_tpot_is_the_mean_gap_after_the_first_token() -> None:
    timeline = Timeline(0.0)
    timeline.token(2.0)
    timeline.token(3.0, count=2)
    timeline.token(5.0)
    assert (timeline.output_tokens, timeline.ttft_s, timeline.tpot_s) == (4, 2.0, 1.0)


def test_two_tokens_at_once_have_no_gap() -> None:
    timeline = Timeline(0.0)
    timeline.token(2.0, count=2)
    assert timeline.tpot_s == 0.0
    assert sum(timeline.handoff_stages().values()) == 0.0
