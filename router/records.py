"""What was decided for each request and what became of it: the last ones in memory, all in a log if asked for."""

from __future__ import annotations

import json
import logging
import math
import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from pdserve.timeline import Timeline
from router.admission import Verdict
from router.caller import ANYBODY
from router.hot_prefixes import Copy
from router.policy import Considered, Decision, Phase
from router.slo import SloClass

log = logging.getLogger(__name__)

_DECISIONS = 16  # kept of one request: the first, and the last ones of one that had to be tried often


@dataclass(slots=True)
class Record:
    """One request; `decisions` in the order they were made, those of repeated tries included."""

    request_id: str
    label: str
    prompt_tokens: int
    slo: SloClass
    tenant: str = ANYBODY.turns
    wall_s: float = field(default_factory=time.time)
    decisions: list[Decision] = field(default_factory=list)
    end: str | None = None  # finish reason or error; None while it runs
    actual: Mapping[str, Any] | None = None
    missed: str | None = None  # the stage that broke the objective
    copy: Copy | None = None  # of a hot prefix, that its placement led to
    verdict: Verdict | None = None  # of admission, once the request has ended
    first: Decision | None = None  # of the decisions, the first that chose somebody

    def note(self, decision: Decision) -> None:
        if self.first is None and decision.row is not None:
            self.first = decision
        if len(self.decisions) >= _DECISIONS:
            del self.decisions[1]
        self.decisions.append(decision)

    @property
    def predicted_ttft_s(self) -> float | None:
        return predicted_ttft_s(self.first)

    @property
    def predicted_tpot_s(self) -> float | None:
        """A step of the worker that was chosen last."""
        last = next((each for each in reversed(self.decisions) if each.chosen is not None), None)
        return last.chosen.step_s if last is not None and last.chosen is not None else None

    def finish(self, end: str, timeline: Timeline, cached_tokens: int, workers: list[str]) -> None:
        self.end = end
        self.actual = {
            "workers": list(workers),
            "cached_tokens": cached_tokens,
            "output_tokens": timeline.output_tokens,
            "ttft_s": timeline.ttft_s,
            "tpot_s": timeline.tpot_s,
            "ttft_stages_s": timeline.ttft_stages(),
            "handoff_stages_s": timeline.handoff_stages(),
        }

    def header(self) -> str:
        """The first decision on one line, for `x-pdserve-decision`."""
        decision = self.first
        if decision is None or decision.chosen is None:
            return "none"
        chosen = decision.chosen
        return (
            f"policy={decision.policy}; worker={chosen.worker_id}; cost_s={chosen.cost:.6f}; "
            f"hit_blocks={chosen.matched_blocks}/{decision.best_hit_blocks}; "
            f"runner_up={decision.runner_up_id or '-'}; filtered={decision.num_filtered}"
        )

    def describe(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "request_id": self.request_id,
            "client_id": self.label,
            "tenant": self.tenant,
            "received_unix_s": round(self.wall_s, 3),
            "prompt_tokens": self.prompt_tokens,
            "slo": asdict(self.slo),
            "decisions": [describe_decision(each) for each in self.decisions],
            "hot_prefix": asdict(self.copy) if self.copy is not None else None,
            "admission": _describe_verdict(self.verdict),
            "predicted": {"ttft_s": self.predicted_ttft_s, "tpot_s": self.predicted_tpot_s},
            "actual": self.actual,
            "end": self.end,
            "missed_by": self.missed,
        }


def predicted_ttft_s(decision: Decision | None) -> float | None:
    """Queueing, fetching and computing on the chosen worker; earlier work weighs in a choice, but delays nobody."""
    if decision is None or decision.chosen is None or decision.phase in (Phase.DECODE, Phase.RESUME):
        return None
    return decision.chosen.fetch_s + decision.chosen.uncached_s + decision.chosen.queued_s


def _describe_verdict(verdict: Verdict | None) -> dict[str, Any] | None:
    if verdict is None:
        return None
    return {
        "reason": verdict.reason,
        "refused": verdict.refused,
        "retry_after_s": verdict.retry_after_s if verdict.reason is not None else None,
        "judged_by_ttft_s": verdict.ttft_s if verdict.ttft_s < math.inf else None,
        "forecast": {**asdict(verdict.forecast), "ttft_s": verdict.forecast.ttft_s},
    }


def describe_decision(decision: Decision) -> dict[str, Any]:
    """JSON-ready; terms in seconds."""
    chosen = decision.chosen
    return {
        "policy": decision.policy,
        "phase": decision.phase.value,
        "chosen": chosen.worker_id if chosen is not None else None,
        "runner_up": decision.runner_up_id,
        "hit_blocks": chosen.matched_blocks if chosen is not None else 0,
        "best_hit_blocks": decision.best_hit_blocks,
        "fetched_blocks": chosen.fetched_blocks if chosen is not None else 0,
        "reachable_blocks": decision.reachable_blocks,
        "predicted_ttft_s": predicted_ttft_s(decision),
        "candidates": [_describe_candidate(each) for each in decision.considered],
        "filtered": [asdict(each) for each in decision.filtered],
        "why_not": decision.why_not() if chosen is None else "",
    }


def _describe_candidate(each: Considered) -> dict[str, Any]:
    return {
        "worker_id": each.worker_id,
        "cost_s": each.cost,
        "terms_s": dict(each.terms),
        "hit_blocks": each.matched_blocks,
        "fetch": {"blocks": each.fetched_blocks, "tier": each.fetch_tier or None, "seconds": each.fetch_s},
        "uncached_tokens": each.uncached_tokens,
        "compute_s": each.uncached_s,
        "queue_s": each.queued_s,
        "decode_step_s": each.step_s,
        "move_bytes": each.move_bytes,
        "link": each.transport or None,
    }


class Records:
    """A ring of the last `capacity` requests, found by the response's id or by the client's own."""

    def __init__(self, capacity: int = 1024, log_file: Path | None = None) -> None:
        """Raises OSError if the log cannot be opened."""
        self._capacity = capacity
        self._by_id: OrderedDict[str, Record] = OrderedDict()
        self._by_label: dict[str, Record] = {}
        self._log: TextIO | None = log_file.open("a", buffering=1) if log_file is not None else None

    def __len__(self) -> int:
        return len(self._by_id)

    def open(self, record: Record) -> Record:
        while len(self._by_id) >= self._capacity:
            _, oldest = self._by_id.popitem(last=False)
            if self._by_label.get(oldest.label) is oldest:
                del self._by_label[oldest.label]
        self._by_id[record.request_id] = record
        if record.label:
            self._by_label[record.label] = record  # a client may repeat its ids: the newest counts
        return record

    def find(self, request_id: str) -> Record | None:
        return self._by_id.get(request_id) or self._by_label.get(request_id)

    def recent(self, limit: int, tenant: str | None = None) -> list[Record]:
        """The last ones, of one tenant or of all, newest first."""
        theirs = (each for each in reversed(self._by_id.values()) if tenant in (None, each.tenant))
        return list(islice(theirs, limit))

    def closed(self, record: Record) -> None:
        """It is finished: one line for the log."""
        if self._log is None:
            return
        try:
            self._log.write(json.dumps(record.describe()) + "\n")
        except OSError as error:
            log.error("the decision log ends here: %s", error)
            self._log = None

    def close(self) -> None:
        if self._log is not None:
            self._log.close()
            self._log = None
