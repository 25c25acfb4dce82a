"""The plan that all workers get at once is the one that each would get alone, cut by cut."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from kvstore.store.rates import PRIORS
from kvstore.store.tier import Tier
from router.policy import Need, Phase, Speed
from router.policy.fetches import FETCH_TIERS, Fetches, Reach
from router.policy.rates import Rates

speeds = st.dictionaries(st.integers(1, 14), st.floats(1.0, 1e5), max_size=3).map(
    lambda found: Speed(prefill_tokens_per_s=tuple(sorted(found.items())))
)
# Of a worker: blocks it holds, blocks in each tier that it reaches, seconds a block out of each, its speed.
workers = st.tuples(
    st.integers(0, 40),
    st.lists(st.integers(0, 40), min_size=3, max_size=3).map(sorted),
    st.lists(st.floats(0.0, 0.1), min_size=3, max_size=3),
    speeds,
)


def alone(
    need: Need, held: int, reached: list[int], block_s: list[float], speed: Speed
) -> tuple[float, float, int, int]:
    """Seconds to fetch, to compute; blocks that are fetched; the farthest tier, 0 for none."""
    most = (need.tokens - 1) // need.block_size
    cuts = []
    end, fetch_s = held, 0.0
    for tier in range(1 + len(FETCH_TIERS)):
        if tier:
            further = max(min(reached[tier - 1], most), held)
            blocks = further - end
            fetch_s += blocks * block_s[tier - 1] + (PRIORS[Tier(tier)].latency_s if blocks else 0.0)
            end = further
        compute_s = speed.prefill_s(max(1, need.tokens - need.block_size * end))
        cuts.append((fetch_s, compute_s, end - held, tier))
    return min(cuts, key=lambda cut: cut[0] + cut[1])


@given(st.lists(workers, min_size=1, max_size=6), st.integers(0, 15), st.integers(1, 40))
def test_each_worker_cuts_where_it_would_alone(
    found: list[tuple[int, list[int], list[float], Speed]], rest: int, blocks: int
) -> None:
    need = Need(Phase.PROMPT, 16 * blocks + rest, 8, 16)
    held = [min(each[0], blocks) for each in found]
    reached = [[min(reach, blocks) for reach in each[1]] for each in found]
    latency_s = np.array([[PRIORS[tier].latency_s] * len(found) for tier in FETCH_TIERS])
    reach = Reach(
        np.array(reached, dtype=np.float64).transpose(), np.array([each[2] for each in found]).transpose(), latency_s
    )
    fetches = Fetches(need, np.array(held, dtype=np.float64), reach, Rates.of([each[3] for each in found]))
    for row, (_, _, block_s, speed) in enumerate(found):
        tier = fetches.tier(row)
        plan = (float(fetches.seconds[row]), float(fetches.compute_s[row]), fetches.blocks(row), tier or 0)
        assert plan == alone(need, held[row], reached[row], block_s, speed)
