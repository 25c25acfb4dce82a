"""What the router knows about its own choices, for people and machines. Implements `router.http.service.Routing`."""

from __future__ import annotations

from typing import Any

from pdserve.request import Request
from router.auto_balance import AutoBalance
from router.dispatch import RouterDispatcher
from router.drift import DriftMeter
from router.fleet import Fleet
from router.member import Member
from router.policy import Role
from router.records import describe_decision
from router.slo import CLASSES
from router.wishes import Wishes


class Explainer:
    def __init__(self, fleet: Fleet, dispatcher: RouterDispatcher, balance: AutoBalance | None = None) -> None:
        self._fleet = fleet
        self._dispatcher = dispatcher
        self._balance = balance

    def explain(self, request_id: str, tenant: str | None = None) -> dict[str, Any] | None:
        record = self._dispatcher.account.records.find(request_id)
        return record.describe() if record is not None and tenant in (None, record.tenant) else None

    def recent(self, limit: int, tenant: str | None = None) -> list[dict[str, Any]]:
        return [record.describe() for record in self._dispatcher.account.records.recent(limit, tenant)]

    def decision_header(self, request_id: str) -> str | None:
        record = self._dispatcher.account.records.find(request_id)
        return record.header() if record is not None else None

    def dry_run(self, request: Request, wishes: Wishes) -> dict[str, Any]:
        return describe_decision(self._dispatcher.dry_run(request, wishes))

    def slo(self) -> dict[str, Any]:
        account = self._dispatcher.account
        errors = {
            name: {"p50": meter.quantile(0.5), "p90": meter.quantile(0.9)}
            for name, meter in account.predictor.errors.items()
        }
        feeder = self._dispatcher.feeder
        waits = {slo.name: feeder.predicted_wait_s(slo) for slo in CLASSES.values()}
        admission = {
            "mode": feeder.mode.value,
            "queued": dict(feeder.depths()),
            "waiting": [
                {"class": name, "for": what, "requests": depth.requests, "tokens": depth.tokens}
                for (name, what), depth in sorted(feeder.backlog().items())
            ],
            "predicted_wait_ms": {name: wait_s * 1e3 for name, wait_s in waits.items() if wait_s is not None},
            **feeder.ledger.describe(),
        }
        cache = {"prompt_tokens": account.prompt_tokens, "cached_tokens": dict(account.cached_tokens)}
        described = {
            "prediction_error": errors,
            "index_drift": _ratios(account.drift),
            "store_drift": _ratios(account.store_drift),
            "admission": admission,
            "cache": cache,
        }
        return account.goodput.describe() | described

    def pairs(self) -> dict[str, Any]:
        """Each prefill worker with each decode worker; an address without a worker behind it is no part of a pair."""
        members = self._fleet.known()
        return {
            "ready": self._fleet.ready,
            "workers": [_describe_worker(each) for each in members],
            "balance": self._balance.describe() if self._balance is not None else None,
            "pairs": [
                self._pair(prefill, decode)
                for prefill in members
                if prefill.role is Role.PREFILL
                for decode in members
                if decode.role is Role.DECODE
            ],
        }

    def _pair(self, prefill: Member, decode: Member) -> dict[str, Any]:
        link = prefill.link_to(decode)
        reason = prefill.incompatible or decode.incompatible
        return {
            "prefill": prefill.worker_id,
            "decode": decode.worker_id,
            "compatible": not reason,
            "up": link is not None and link.up,
            "transport": link.transport if link is not None else None,
            "bytes_per_second": link.bytes_per_s if link is not None and link.bytes_per_s else None,
            "last_error": prefill.link_errors.get(decode.worker_id),
            "error": reason or (link.error if link is not None else "no link was reported yet"),
        }


def _ratios(drift: DriftMeter) -> dict[str, float]:
    return {"false_hit_ratio": drift.false_hit_ratio, "false_miss_ratio": drift.false_miss_ratio}


def _describe_worker(member: Member) -> dict[str, Any]:
    return {
        "worker_id": member.worker_id,
        "role": member.role.value,
        "next_role": member.next_role.value if member.next_role is not None else None,
        "state": member.state,
        "error": member.incompatible,
    }
