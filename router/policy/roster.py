"""What seldom changes about workers and the links between them, as columns: an element a worker, by ascending id."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from router.policy.candidate import Candidate, LinkFacts, Role

Numbers = NDArray[np.float64]
Flags = NDArray[np.bool_]


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
    least_model_len: float  # of any of them
    least_total_blocks: float
    # What follows from the roster alone, kept by whoever works it out: the same key, the same value.
    memo: dict[Hashable, Any] = field(default_factory=dict)

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
            least_model_len=min((each.max_model_len for each in workers), default=0),
            least_total_blocks=min((each.total_blocks for each in workers), default=0),
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


def _flags(values: Iterable[bool]) -> Flags:
    return np.fromiter(values, dtype=np.bool_)


def _numbers(values: Iterable[float]) -> Numbers:
    return np.fromiter(values, dtype=np.float64)
