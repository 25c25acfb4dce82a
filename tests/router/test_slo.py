"""A request is good if TTFT and TPOT meet its class; a miss names the stage that broke it."""

from __future__ import annotations

import pytest

from pdserve.errors import InvalidRequest
from pdserve.timeline import Timeline
from router.slo import CLASSES, GoodputTracker, SloClass, first_miss, is_lost, parse_slo

SLO = SloClass("test", ttft_s=1.0, tpot_s=0.1)


def timeline(queue_s: float = 0.1, compute_s: float = 0.2, gaps_s: tuple[float, ...] = (0.05,) * 9) -> Timeline:
    made = Timeline(received_s=0.0, tokenised_s=0.01, dispatched_s=0.02)
    made.reported.update(queue=queue_s, compute=compute_s)
    now_s = 0.02 + queue_s + compute_s
    made.token(now_s)
    for gap_s in gaps_s:
        now_s += gap_s
        made.token(now_s)
    return made


@pytest.mark.parametrize(
    ("made", "missed"),
    [
        (timeline(), None),
        (timeline(gaps_s=()), None),
        (timeline(queue_s=2.0), "queue"),
        (timeline(compute_s=2.0), "compute"),
        (timeline(queue_s=1.5, compute_s=2.0), "queue"),  # late already before the longer stage
        (timeline(queue_s=0.9, compute_s=0.5), "compute"),
        (timeline(gaps_s=(0.2,) * 9), "decode"),
        (Timeline(received_s=0.0), "failed"),
    ],
)
def test_the_stage_that_broke_it(made: Timeline, missed: str | None) -> None:
    assert first_miss(SLO, made) == missed


def test_a_slow_hand_over_is_told_from_slow_decode() -> None:
    gaps_s = (2.0, *(0.05,) * 9)
    made = timeline(gaps_s=gaps_s)
    assert first_miss(SLO, made) == "decode"
    made.reported.update(reserve=0.1, transfer=1.8, commit=0.05)
    assert first_miss(SLO, made) == "transfer"


def test_a_hand_over_is_put_down_to_the_stage_in_which_the_gaps_became_too_long() -> None:
    made = timeline(gaps_s=(2.0, *(0.05,) * 9))
    made.reported.update(reserve=0.9, transfer=1.0, commit=0.05)
    assert first_miss(SLO, made) == "reserve"


@pytest.mark.parametrize(
    ("made", "now_s", "lost"),
    [
        (Timeline(received_s=0.0), 0.9, False),
        (Timeline(received_s=0.0), 1.1, True),
        (timeline(compute_s=2.0, gaps_s=()), 2.1, True),
        # Ten tokens at most may take 0.9 s after the first, which came after 0.32 s.
        (timeline(gaps_s=()), 1.2, False),
        (timeline(gaps_s=()), 1.3, True),
    ],
)
def test_what_can_no_longer_be_good(made: Timeline, now_s: float, lost: bool) -> None:
    assert is_lost(SLO, made, 10, now_s) == lost


def test_classes_by_name_and_by_numbers() -> None:
    assert parse_slo("interactive") is CLASSES["interactive"]
    assert parse_slo('{"ttft_ms": 500, "tpot_ms": 50}') == SloClass("custom", 0.5, 0.05)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "fast",
        "[]",
        "{}",
        '{"ttft_ms": 1}',
        '{"ttft_ms": "x", "tpot_ms": 1}',
        '{"ttft_ms": "500", "tpot_ms": 1}',
        '{"ttft_ms": 500, "tpot_ms": true}',
        '{"ttft_ms": 500, "tpot_ms": 50, "tpt_ms": 5}',
        '{"ttft_ms": 500}',
        '{"ttft_ms": 1e307, "tpot_ms": 50}',
        '{"ttft_ms": 500, "tpot_ms": 86400001}',
        '{"ttft_ms": -1, "tpot_ms": 1}',
        '{"ttft_ms": NaN, "tpot_ms": 1}',
        '{"ttft_ms": Infinity, "tpot_ms": 1}',
        "[" * 100_000,
    ],
)
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(InvalidRequest, match="interactive, standard, batch"):
        parse_slo(text)


def test_goodput_by_class_and_pair() -> None:
    tracker = GoodputTracker()
    tracker.note(CLASSES["standard"], ("p", "d"), None)
    tracker.note(CLASSES["standard"], ("p", "e"), "queue")
    tracker.note(CLASSES["batch"], ("p", "d"), None)
    described = tracker.describe()
    standard = {"requests": 2, "good": 1, "goodput": 0.5, "missed_by_stage": {"queue": 1}}
    assert described["classes"]["standard"] == standard
    assert described["pairs"][0] == {
        "prefill": "p",
        "decode": "d",
        "requests": 2,
        "good": 2,
        "goodput": 1.0,
        "missed_by_stage": {},
    }


def test_goodput_by_tenant() -> None:
    tracker = GoodputTracker()
    tracker.note(SLO, ("p", "d"), None, "acme")
    tracker.note(SLO, ("p", "d"), "queue", "acme")
    tracker.note(SLO, ("p", "d"), None)
    tenants = tracker.describe()["tenants"]
    assert tenants["acme"] == {"requests": 2, "good": 1, "goodput": 0.5, "missed_by_stage": {"queue": 1}}
    assert tenants["default"]["goodput"] == 1.0
    assert tracker.by_pair() == {("p", "d", True): 2, ("p", "d", False): 1}


def test_label_sets_are_bounded() -> None:
    tracker = GoodputTracker()
    for number in range(5000):
        tracker.note(SLO, (f"p{number}", "d"), None, f"t{number}")
    assert len(tracker.by_tenant) <= 65
    assert len(tracker.outcomes) <= 1025
    assert sum(tracker.outcomes.values()) == 5000
    for _ in range(10):
        tracker.note(SLO, ("p0", "d"), None)
    assert tracker.outcomes[SLO.name, "p0", "d", ""] == 11, "who was there before is counted on"
    assert sum(tracker.outcomes.values()) == 5010
