"""A window's quantiles are those of its last values, whatever came before."""

from __future__ import annotations

from statistics import median

from hypothesis import given
from hypothesis import strategies as st

from router.window import Window


@given(size=st.integers(1, 9), values=st.lists(st.integers(-3, 3).map(float) | st.floats(-1e6, 1e6), min_size=1))
def test_median_and_quantile_are_of_the_last_values(size: int, values: list[float]) -> None:
    window = Window(size)
    kept: list[float] = []
    for value in values:
        window.add(value)
        kept = [*kept, value][-size:]
        assert len(window) == len(kept)
        assert window.median == median(kept)
        assert window.quantile(0.9) == sorted(kept)[int(0.9 * len(kept))]
    window.drop_newest()
    if kept[:-1]:
        assert window.median == median(kept[:-1])
