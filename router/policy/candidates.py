"""All candidates at once, as columns: a policy scores a fleet with a few array operations, whatever its size.

Every array has one element a worker, in the order of the worker ids; numbers are float64, so that columns combine
without conversions. Nothing here changes after it was made: a decision keeps its `Snapshot` and is
explained from it.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from kvstore.store.rates import PRIORS
from kvstore.store.tier import Tier
from router.policy.candidate import RATE_BITS, Candidate, LinkFacts, LoadView, Need, Role, Speed

Numbers = NDArray[np.float64]
Flags = NDArray[np.bool_]

RATE_COLUMNS = RATE_BITS + 1
# Rows of a table of loads, a column a worker.
WAITING_TOKENS, RECENT_TOKENS, SEQUENCES, CONTEXT_TOKENS, FREE_BLOCKS = range(5)
LOAD_ROWS = 5
# Rows of a table of what stores hold; a tier's number is one more than its row.
FETCH_TIERS = (Tier.HOST, Tier.DISK, Tier.REMOTE)
_LATENCY_S = np.array([[PRIORS[tier].latency_s] for tier in FETCH_TIERS])


def load_column(load: LoadView) -> tuple[float, ...]:
    return (load.waiting_tokens, load.recent_tokens, load.sequences, load.context_tokens, load.free_blocks)


@dataclass(frozen=True, slots=True, eq=False)
class Roster:
    """What seldom changes about the workers; shared by all decisions until it does. `of` makes one."""

    worker_ids: tuple[str, ...]  # sorted
    roles: tuple[Role, ...]
    incompatible: tuple[str, ...]
    compatible: Flags
    alive: Flags
    leaving: tuple[str, ...]
    takes_requests: Flags
    prefill: Flags  # of that role
    shares_step: Numbers  # 1 where decoding shares the step with a prompt, 0 on a prefill worker
    decode: Flags
    has_store: Flags
    store_node: NDArray[np.intp]
    store_shares: Numbers  # 1 where its node fetches from others
    max_model_len: Numbers
    max_sequences: Numbers
    total_blocks: Numbers
    block_bytes: Numbers
    partners: Numbers
    none_s: Numbers  # zeros
    rows: NDArray[np.intp]  # 0, 1, ...
    # What follows from the roster alone, kept by whoever works it out: the same key, the same value.
    memo: dict[Hashable, Flags] = field(default_factory=dict)

    @classmethod
    def of(cls, workers: Sequence[Candidate]) -> Roster:
        """`workers` by ascending worker_id."""
        roles = tuple(each.role for each in workers)
        return cls(
            worker_ids=tuple(each.worker_id for each in workers),
            roles=roles,
            incompatible=tuple(each.incompatible for each in workers),
            compatible=_flags(not each.incompatible for each in workers),
            alive=_flags(each.alive for each in workers),
            leaving=tuple(each.leaving for each in workers),
            takes_requests=_flags(not each.leaving for each in workers),
            prefill=_flags(role is Role.PREFILL for role in roles),
            shares_step=_numbers(role is not Role.PREFILL for role in roles),
            decode=_flags(role is Role.DECODE for role in roles),
            has_store=_flags(each.has_store for each in workers),
            store_node=np.fromiter((each.store_node for each in workers), dtype=np.intp),
            store_shares=_numbers(each.store_shares for each in workers),
            max_model_len=_numbers(each.max_model_len for each in workers),
            max_sequences=_numbers(each.max_sequences for each in workers),
            total_blocks=_numbers(each.total_blocks for each in workers),
            block_bytes=_numbers(each.block_bytes for each in workers),
            partners=_numbers(each.partners for each in workers),
            none_s=np.zeros(len(workers)),
            rows=np.arange(len(workers)),
        )

    def __len__(self) -> int:
        return len(self.worker_ids)


@dataclass(frozen=True, slots=True, eq=False)
class Links:
    """From one prefill worker to each worker of a roster."""

    facts: tuple[LinkFacts | None, ...]
    up: Flags
    bytes_per_s: Numbers  # 0: not measured, or no link

    @classmethod
    def of(cls, facts: Sequence[LinkFacts | None]) -> Links:
        return cls(
            tuple(facts),
            _flags(each is not None and each.up for each in facts),
            _numbers(0.0 if each is None else each.bytes_per_s for each in facts),
        )


@dataclass(frozen=True, slots=True, eq=False)
class Reach:
    """What each worker's store holds of a request.

    Attributes:
        blocks: leading blocks that are in the host tier, on disk or before it, anywhere; never falling; [3, workers].
        block_s: seconds a block out of these tiers, behind their latency; [3, workers].
    """

    blocks: Numbers
    block_s: Numbers


@dataclass(frozen=True, slots=True, eq=False)
class Snapshot:
    """What a decision was made from and is explained from."""

    roster: Roster
    loads: Numbers  # [LOAD_ROWS, workers]
    matched_blocks: Numbers  # leading blocks of the request that each holds
    speeds: tuple[Speed, ...]
    links: Links | None = None  # in phase DECODE
    reach: Reach | None = None  # None: no store node is known, or the phase reads none

    def __len__(self) -> int:
        return len(self.roster.worker_ids)

    def _row(self, at: int) -> Numbers:
        row: Numbers = self.loads[at]
        return row

    @property
    def waiting_tokens(self) -> Numbers:
        return self._row(WAITING_TOKENS)

    @property
    def recent_tokens(self) -> Numbers:
        return self._row(RECENT_TOKENS)

    @property
    def sequences(self) -> Numbers:
        return self._row(SEQUENCES)

    @property
    def context_tokens(self) -> Numbers:
        return self._row(CONTEXT_TOKENS)

    @property
    def free_blocks(self) -> Numbers:
        return self._row(FREE_BLOCKS)


def uncached_tokens(need: Need, held_blocks: Numbers) -> Numbers:
    """Never below one: the last token is computed even when every block is there."""
    return np.maximum(need.tokens - need.block_size * held_blocks, 1.0)


class Candidates:
    """
    Attributes:
        seen: the columns.
    """

    __slots__ = ("_fetched", "_first", "_load_s", "_rates", "_uncached_s", "seen")

    def __init__(self, seen: Snapshot, rates: Numbers, first: NDArray[np.intp]) -> None:
        """
        Args:
            rates: tokens/s, RATE_COLUMNS for each of some workers, flat: `Speed.prefill_rates` one behind the other.
            first: where in `rates` those of each worker of `seen` begin.
        """
        self.seen = seen
        self._rates = rates
        self._first = first
        self._load_s: Numbers | None = None
        self._uncached_s: tuple[Need, Numbers] | None = None
        self._fetched: tuple[Need, Fetched] | None = None

    @classmethod
    def of(cls, workers: Iterable[Candidate]) -> Candidates:
        """From records, in any order."""
        ordered = sorted(workers, key=lambda each: each.worker_id)
        loads = np.array([load_column(each.load) for each in ordered], dtype=np.float64).reshape(-1, LOAD_ROWS)
        seen = Snapshot(
            Roster.of(ordered),
            loads.transpose(),
            _numbers(each.matched_blocks for each in ordered),
            tuple(each.speed for each in ordered),
            Links.of([each.link for each in ordered]),
        )
        rates = np.array([each.speed.prefill_rates() for each in ordered], dtype=np.float64).reshape(-1)
        return cls(seen, rates, np.arange(len(ordered)) * RATE_COLUMNS)

    @property
    def none_s(self) -> Numbers:
        """Nothing for anybody."""
        return self.seen.roster.none_s

    def load_s(self, row: int) -> Numbers:
        """Seconds to compute what waits on each (WAITING_TOKENS), or what was sent there lately (RECENT_TOKENS)."""
        if self._load_s is None:  # both at once cost little more than one
            self._load_s = self.prefill_s(self.seen.loads[: RECENT_TOKENS + 1])
        seconds: Numbers = self._load_s[row]
        return seconds

    def uncached_s(self, need: Need) -> Numbers:
        """To compute what each neither holds nor fetches."""
        if (fetched := self.fetched(need)) is not None:
            return fetched.compute_s
        if self._uncached_s is None or self._uncached_s[0] is not need:
            self._uncached_s = need, self.prefill_s(uncached_tokens(need, self.seen.matched_blocks))
        return self._uncached_s[1]

    def fetched(self, need: Need) -> Fetched | None:
        """What each would bring from the store first; None where there is none."""
        if self.seen.reach is None:
            return None
        if self._fetched is None or self._fetched[0] is not need:
            self._fetched = need, plan_fetches(need, self)
        return self._fetched[1]

    def prefill_s(self, tokens: Numbers) -> Numbers:
        """As `Speed.prefill_s` of each worker for its own number of tokens, below 2**RATE_BITS; [..., workers]."""
        bits = np.maximum(np.frexp(tokens)[1], 0)  # the bit length of the whole part
        return tokens / self._rates.take(self._first + bits)

    def divide_by_rates(self, tokens: Numbers) -> None:
        """As `prefill_s` of at least one token each, in place."""
        tokens /= self._rates.take(self._first + np.frexp(tokens)[1])

    def constant_prefill_s(self, tokens: int) -> Numbers:
        """As `prefill_s` for the same number of tokens on each."""
        return tokens / self._rates.take(self._first + tokens.bit_length())


@dataclass(frozen=True, slots=True, eq=False)
class Fetched:
    """What each worker would bring from the store before it computes; an element a worker."""

    blocks: Numbers
    seconds: Numbers
    compute_s: Numbers  # the rest
    tier: NDArray[np.intp]  # the farthest that they come from: a `Tier`, or 0 for none


def plan_fetches(need: Need, candidates: Candidates) -> Fetched:
    """Where each worker cuts between fetching and computing, as its own planner would: behind what it holds, behind the
    host tier, behind the disk, or behind all that there is, whichever takes least. The last token is always computed.
    """
    seen = candidates.seen
    assert seen.reach is not None
    most = max(0, need.tokens - 1) // need.block_size
    table = np.empty((3, 1 + len(FETCH_TIERS), len(seen)))  # of each cut: where it is, seconds to fetch, to compute
    ends, fetch_s, compute_s = table
    ends[0] = seen.matched_blocks
    np.minimum(seen.reach.blocks, most, out=ends[1:])
    np.maximum(ends[1:], seen.matched_blocks, out=ends[1:])
    blocks = ends[1:] - ends[:-1]
    fetch_s[0] = 0.0
    np.multiply(blocks, seen.reach.block_s, out=fetch_s[1:])
    fetch_s[1:] += (blocks > 0.0) * _LATENCY_S
    for tier in range(1, len(FETCH_TIERS)):
        fetch_s[tier + 1] += fetch_s[tier]
    np.multiply(ends, -need.block_size, out=compute_s)
    compute_s += need.tokens
    np.maximum(compute_s, 1.0, out=compute_s)
    candidates.divide_by_rates(compute_s)
    cut = (fetch_s + compute_s).argmin(axis=0)
    best = table.reshape(3, -1).take(cut * len(seen) + seen.roster.rows, axis=1)
    return Fetched(best[0] - ends[0], best[1], best[2], cut)


def _flags(values: Iterable[bool]) -> Flags:
    return np.fromiter(values, dtype=np.bool_)


def _numbers(values: Iterable[float]) -> Numbers:
    return np.fromiter(values, dtype=np.float64)
