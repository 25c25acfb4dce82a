"""Judging a worker's ledger as it came over the wire (design invariant I1): the sum is worked out, not believed."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

STATES = ("free", "cached", "held", "sending", "receiving", "quarantined")


@dataclass(frozen=True, slots=True)
class Audit:
    """One worker. Without a `problem` its ledger sums to its pool; `holds` counts owners, ages are in seconds."""

    worker: str
    total_blocks: int | None = None
    by_state: dict[str, int] = field(default_factory=dict)
    holds: int = 0
    oldest_hold_s: float | None = None
    problem: str = ""

    @property
    def whole(self) -> bool:
        return not self.problem

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "whole": self.whole}


def audit(address: str, ledger: Any) -> Audit:
    """Judge what `GET /ledger` of the worker at `address` gave."""
    try:
        worker = str(ledger["worker_id"])
        total = _count(ledger["total_blocks"])
        by_state = {state: _count(ledger["by_state"][state]) for state in STATES}
        unknown = sorted(set(ledger["by_state"]) - set(STATES))
        ages = [float(hold["age_s"]) for hold in ledger["holds"]]
    except (KeyError, TypeError, ValueError) as error:
        return Audit(address, problem=f"malformed ledger: {type(error).__name__} {error}")
    problem = ""
    counted = sum(by_state.values())
    if unknown:
        problem = f"unknown states: {', '.join(unknown)}"
    elif counted != total:
        problem = f"{counted} blocks counted, {total} in the pool"
    elif ledger.get("sums") is not True:
        problem = "the worker says that its ledger does not sum"
    return Audit(worker, total, by_state, len(ages), max(ages, default=None), problem)


def _count(value: Any) -> int:
    if not isinstance(value, int) or value < 0:
        raise ValueError(f"{value!r} is no count")
    return value
