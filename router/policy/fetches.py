"""What each worker would bring from the store before it computes, as its own planner would."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import numpy as np

from kvstore.store.tier import Tier
from router.policy.candidate import Need
from router.policy.rates import Rates
from router.policy.roster import Numbers

# Rows of a table of what stores hold; a tier's number is one more than its row.
FETCH_TIERS = (Tier.HOST, Tier.DISK, Tier.REMOTE)
_ONE = np.array(1.0)


class Reach(NamedTuple):
    """What each worker's store holds of a request.

    Attributes:
        blocks: leading blocks that are in the host tier, on disk or before it, anywhere; never falling; [3, workers].
        block_s: seconds a block out of these tiers, behind their latency; [3, workers].
        latency_s: of these tiers; [3, workers].
    """

    blocks: Numbers
    block_s: Numbers
    latency_s: Numbers


def uncached_tokens(need: Need, ready_blocks: Numbers, out: Numbers | None = None) -> Numbers:
    """Behind so many blocks, into `out` if it is given. Never below one: the last token is computed even when every
    block is there."""
    tokens = np.multiply(ready_blocks, -float(need.block_size), out=out)
    tokens += float(need.tokens)
    np.maximum(tokens, _ONE, out=tokens)
    return tokens


class Fetches:
    """Where each worker cuts between fetching and computing: behind what it holds, behind the host tier, behind the
    disk, or behind all that there is, whichever takes least. The last token is always computed.

    Attributes:
        seconds: to fetch, an element a worker.
        compute_s: to compute the rest.
    """

    __slots__ = ("_cut", "_ends", "compute_s", "seconds")

    def __init__(self, need: Need, held_blocks: Numbers, reach: Reach, rates: Rates) -> None:
        workers, cuts = len(held_blocks), 1 + len(FETCH_TIERS)
        most = float(max(0, need.tokens - 1) // need.block_size)
        self._ends = ends = np.empty((cuts, workers))  # of each cut
        ends[0] = held_blocks
        beyond = ends[1:]
        np.minimum(reach.blocks, most, out=beyond)
        np.maximum(beyond, held_blocks, out=beyond)
        blocks = beyond - ends[:-1]
        table = np.zeros((2, cuts, workers))  # of each cut: seconds to fetch, to compute
        fetch_s, compute_s = table[0], table[1]
        to_each = fetch_s[1:]
        np.multiply(blocks, reach.block_s, out=to_each)
        np.minimum(blocks, _ONE, out=blocks)
        blocks *= reach.latency_s
        to_each += blocks
        for nearer, farther in pairwise(to_each):
            farther += nearer
        rates.become_seconds(uncached_tokens(need, ends, out=compute_s))
        self._cut = (fetch_s + compute_s).argmin(axis=0)
        best = table.reshape(2, -1).take(self._cut * workers + np.arange(workers), axis=1)
        self.seconds: Numbers = best[0]
        self.compute_s: Numbers = best[1]

    def blocks(self, row: int) -> int:
        """That a worker fetches, behind those that it holds."""
        return int(self._ends[self._cut[row], row] - self._ends[0, row])

    def tier(self, row: int) -> Tier | None:
        """The farthest that they come from."""
        cut = int(self._cut[row])
        return Tier(cut) if cut else None
