"""The time of a decode step by batch and context: recovered from noisy steps, whatever a few outliers say."""

from __future__ import annotations

import math
import random

import hypothesis.strategies as st
import pytest
from hypothesis import given

from router.step_model import USUAL_STEP, StepLearner, StepModel, fit

TRUE = StepModel(base_s=0.03, per_sequence_s=0.0012, per_token_s=2e-6)


def taught(outliers: float) -> StepModel:
    rng, learner = random.Random(1), StepLearner()
    for _ in range(2000):
        sequences = rng.randint(1, 40)
        context = sequences * rng.randint(50, 800)
        step_s = TRUE.step_s(sequences, context) * rng.uniform(0.9, 1.1)
        learner.note(sequences, context, step_s * (50 if rng.random() < outliers else 1))
    return learner.model


@pytest.mark.parametrize("outliers", [0.0, 0.1, 0.3])
def test_it_finds_what_made_the_steps(outliers: float) -> None:
    model = taught(outliers)
    for sequences, context in ((1, 100), (8, 4000), (32, 16_000), (60, 30_000)):
        assert model.step_s(sequences, context) == pytest.approx(TRUE.step_s(sequences, context), rel=0.1)


def test_steps_of_one_size_are_met_and_larger_batches_take_longer() -> None:
    learner = StepLearner()
    for _ in range(50):
        learner.note(4, 1000, 0.05)
    assert learner.model.step_s(4, 1000) == pytest.approx(0.05)
    assert learner.model.step_s(8, 2000) > 0.05


def test_a_lasting_change_is_followed() -> None:
    learner = StepLearner()
    for step_s in (0.05, 0.1):
        for _ in range(100):
            for sequences in (1, 8):
                learner.note(sequences, 100 * sequences, step_s)
    assert learner.model.step_s(8, 800) == pytest.approx(0.1, rel=0.01)


def test_nonsense_is_left_out() -> None:
    learner = StepLearner()
    for step_s in (0.0, -1.0, math.nan, math.inf):
        learner.note(4, 100, step_s)
    learner.note(0, 100, 1.0)
    assert learner.model == USUAL_STEP


def test_the_largest_batch_within_a_time() -> None:
    assert TRUE.largest_batch(TRUE.step_s(10, 10 * 500), 500) == pytest.approx(10)
    assert TRUE.largest_batch(0.03, 500) == 0.0
    assert StepModel(0.01, 0.0, 0.0).largest_batch(0.02, 500) == math.inf


SIZES = st.tuples(st.floats(1, 256), st.floats(0, 1e6), st.floats(1e-4, 10.0))


@given(st.lists(SIZES, min_size=1, max_size=64))
def test_no_part_is_ever_negative(points: list[tuple[float, float, float]]) -> None:
    model = fit(points, [1.0] * len(points))
    assert min(model.base_s, model.per_sequence_s, model.per_token_s) >= 0.0
    assert math.isfinite(model.step_s(10, 1000))
