"""Service level objectives and live goodput: a request is good if TTFT and TPOT both meet its class (design section 7).

A miss is put down to the first stage that broke the objective, not to the longest: what comes after it was late
already. Of a missed TTFT that is the first stage at whose end the time so far was more than the class allows. Of a
missed TPOT it is decode, if its gaps alone are more than all gaps may take; else the first stage of the hand-over at
whose end they were.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from pdserve.errors import ConfigError, InvalidRequest
from pdserve.slo import Slo
from pdserve.timeline import Timeline

STANDARD = "standard"
CUSTOM = "custom"
FAILED = "failed"
REFUSED = "refused"  # by admission: no stage began
_LONGEST_MS = 86_400_000.0  # sums of what clients ask for must stay finite
_MAX_PAIRS = 1024  # label sets that are counted apart; what comes later goes to one
_MAX_TENANTS = 64  # as above


@dataclass(frozen=True, slots=True)
class SloClass:
    name: str
    ttft_s: float
    tpot_s: float

    @property
    def objectives(self) -> Slo:
        """What load tests judge by too."""
        return Slo(self.ttft_s, self.tpot_s)


class _Given(msgspec.Struct, forbid_unknown_fields=True):
    ttft_ms: float
    tpot_ms: float


CLASSES = {
    each.name: each
    for each in (SloClass("interactive", 1.0, 0.1), SloClass(STANDARD, 4.0, 0.25), SloClass("batch", 120.0, 2.0))
}


def parse_slo(text: str) -> SloClass:
    """A class by name, or a JSON object with `ttft_ms` and `tpot_ms`. Raises InvalidRequest."""
    if text in CLASSES:
        return CLASSES[text]
    try:
        given = msgspec.json.decode(text, type=_Given)
    except (msgspec.MsgspecError, RecursionError):
        given = _Given(math.nan, math.nan)
    if not (0 < given.ttft_ms <= _LONGEST_MS and 0 < given.tpot_ms <= _LONGEST_MS):
        names = ", ".join(CLASSES)
        raise InvalidRequest(
            f"x-pdserve-slo is one of {names}, or an object of two numbers above 0, of at most a day: "
            '{"ttft_ms": 500, "tpot_ms": 50}.'
        )
    return SloClass(CUSTOM, given.ttft_ms / 1e3, given.tpot_ms / 1e3)


def check_slo(text: str) -> None:
    """Raises ConfigError for a tenant's class that does not exist; "" is the default."""
    try:
        parse_slo(text or STANDARD)
    except InvalidRequest as error:
        raise ConfigError(f"slo: '{text[:64]}' is none of {', '.join(CLASSES)}, nor an object of objectives") from error


def first_miss(slo: SloClass, timeline: Timeline) -> str | None:
    """The stage that broke the objective; None for a good request."""
    ttft_s, tpot_s = timeline.ttft_s, timeline.tpot_s
    if ttft_s is None:
        return FAILED
    if not slo.objectives.meets_ttft(ttft_s):
        return _first_over(timeline.ttft_stages(), slo.ttft_s)
    if tpot_s is None or slo.objectives.meets_tpot(tpot_s):
        return None
    handoff = timeline.handoff_stages()
    gaps = timeline.output_tokens - 1
    decode_s = tpot_s * gaps - sum(handoff.values())
    left_s = slo.tpot_s * gaps - decode_s
    return _first_over(handoff, left_s) if handoff and left_s >= 0.0 else "decode"


def is_lost(slo: SloClass, timeline: Timeline, most_tokens: int, now_s: float) -> bool:
    """Whether a request that has not ended could no longer become good, if all its tokens came now."""
    if timeline.first_token_s is None:
        return not slo.objectives.meets_ttft(now_s - timeline.received_s)
    longest_s = slo.tpot_s * (most_tokens - 1)
    return not slo.objectives.meets_ttft(timeline.ttft_s) or now_s - timeline.first_token_s > longest_s


def _first_over(stages: Mapping[str, float], limit_s: float) -> str:
    """Stages in their order; together they take longer than `limit_s`, but for rounding."""
    passed_s = 0.0
    for stage, seconds in stages.items():
        passed_s += seconds
        if passed_s > limit_s:
            return stage
    return stage


class GoodputTracker:
    """Counts good requests and misses by class, prefill worker and decode worker since the start."""

    def __init__(self) -> None:
        self.outcomes: Counter[tuple[str, str, str, str]] = Counter()  # class, prefill, decode, stage; "" is good
        self.by_tenant: dict[str, Counter[str]] = {}  # stages

    def note(self, slo: SloClass, workers: tuple[str, str], missed: str | None, tenant: str = "default") -> None:
        """`workers`: the first and the last that did a part."""
        if tenant not in self.by_tenant and len(self.by_tenant) >= _MAX_TENANTS:
            tenant = "other"
        self.by_tenant.setdefault(tenant, Counter())[missed or ""] += 1
        labels = (slo.name, *workers, missed or "")
        if labels not in self.outcomes and len(self.outcomes) >= _MAX_PAIRS:
            labels = (slo.name, "other", "other", missed or "")
        self.outcomes[labels] += 1

    def by_class(self) -> Counter[tuple[str, str]]:
        """(class, stage): requests."""
        totals: Counter[tuple[str, str]] = Counter()
        for (name, _, _, stage), count in self.outcomes.items():
            totals[name, stage] += count
        return totals

    def by_pair(self) -> Counter[tuple[str, str, bool]]:
        """(prefill worker, decode worker, good): requests."""
        totals: Counter[tuple[str, str, bool]] = Counter()
        for (_, prefill, decode, stage), count in self.outcomes.items():
            totals[prefill, decode, not stage] += count
        return totals

    def describe(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "objectives": {
                each.name: {"ttft_ms": each.ttft_s * 1e3, "tpot_ms": each.tpot_s * 1e3} for each in CLASSES.values()
            },
            "classes": {
                name: _sum(Counter({key: n for key, n in self.outcomes.items() if key[0] == name}))
                for name in sorted({key[0] for key in self.outcomes})
            },
            "tenants": {name: _share(stages) for name, stages in sorted(self.by_tenant.items())},
            "pairs": [
                {"prefill": prefill, "decode": decode}
                | _sum(Counter({key: n for key, n in self.outcomes.items() if key[1:3] == (prefill, decode)}))
                for prefill, decode in sorted({key[1:3] for key in self.outcomes})
            ],
        }


def _sum(outcomes: Counter[tuple[str, str, str, str]]) -> dict[str, Any]:
    stages: Counter[str] = Counter()
    for key, count in outcomes.items():
        stages[key[3]] += count
    return _share(stages)


def _share(stages: Counter[str]) -> dict[str, Any]:
    good, total = stages[""], stages.total()
    missed = {stage: count for stage, count in stages.items() if stage}
    return {"requests": total, "good": good, "goodput": good / total, "missed_by_stage": missed}
