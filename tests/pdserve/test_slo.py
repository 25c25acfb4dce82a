"""A request is good if it meets both objectives; what it never had to meet cannot make it bad."""

from __future__ import annotations

import pytest

from pdserve.slo import Slo, is_good

SLO = Slo(ttft_s=1.0, tpot_s=0.1)


@pytest.mark.parametrize(
    ("ttft_s", "tpot_s", "good"),
    [
        (1.0, 0.1, True),  # exactly on both
        (1.001, 0.05, False),
        (0.5, 0.101, False),
        (0.5, None, True),  # one token: no gap that could be late
        (None, None, False),  # no token
    ],
)
def test_good_is_both_objectives(ttft_s: float | None, tpot_s: float | None, good: bool) -> None:
    assert is_good(SLO, ttft_s, tpot_s) is good
