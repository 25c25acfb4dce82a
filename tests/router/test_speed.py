"""Rates are learned from what happened, by size, and a few outliers move nothing."""

from __future__ import annotations

import math

import pytest

from router.policy import Speed
from router.speed import ErrorMeter, SpeedLearner


def test_prefill_rate_depends_on_length() -> None:
    learner = SpeedLearner()
    for _ in range(5):
        learner.note_prefill(64, 0.064)
        learner.note_prefill(4096, 1.0)
    assert learner.speed.prefill_s(64) == pytest.approx(0.064)
    assert learner.speed.prefill_s(8192) == pytest.approx(2.0)


def test_decode_step_depends_on_the_batch() -> None:
    learner = SpeedLearner()
    learner.note_step(1, 0.02)
    learner.note_step(30, 0.08)
    assert learner.speed.decode_step_s(1) == 0.02
    assert learner.speed.decode_step_s(100) == 0.08


def test_outliers_and_nonsense_move_nothing() -> None:
    learner = SpeedLearner()
    for _ in range(10):
        learner.note_prefill(1000, 1.0)
    for nonsense in (0.0, -1.0, math.inf, math.nan):
        learner.note_prefill(1000, nonsense)
        learner.note_step(4, nonsense)
    for _ in range(9):
        learner.note_prefill(1000, 100.0)
    assert learner.speed.prefill_s(1000) == pytest.approx(1.0)
    assert learner.speed.step_s == ()


def test_a_lasting_change_is_followed() -> None:
    learner = SpeedLearner()
    for _ in range(100):
        learner.note_step(4, 0.01)
    for _ in range(20):
        learner.note_step(4, 0.05)
    assert learner.speed.decode_step_s(4) == 0.05


def test_an_unmeasured_worker_has_the_usual_speed() -> None:
    assert SpeedLearner().speed == Speed()
    assert Speed().prefill_s(2000) == pytest.approx(1.0)


def test_error_is_a_share_of_what_happened() -> None:
    meter = ErrorMeter()
    assert meter.quantile(0.5) is None
    for predicted_s in (1.0, 1.1, 1.2, 3.0):
        meter.note(predicted_s, 1.0)
    meter.note(5.0, 0.0)
    assert meter.quantile(0.5) == pytest.approx(0.2)
    assert meter.quantile(0.9) == pytest.approx(2.0)
