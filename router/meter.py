"""What tenants may take in a minute and at once: token buckets, under a clock that is given. Pure.

A bucket holds one minute's worth and fills evenly. What a request takes is known in part when it comes (itself, its
prompt) and in part when it has ended (its output); the latter is taken then, so a bucket may be below zero, and its
tenant waits until it is not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from pdserve.errors import TenantOverQuota
from pdserve.tenants import Tenant

_MINUTE_S = 60.0
_ROUNDING_S = 1e-9  # whoever waited as long as it was told is let in, whatever sums of floats say


@dataclass(slots=True)
class _Bucket:
    """`left` is None before the first look."""

    left: float | None = None
    at_s: float = 0.0

    def wait_s(self, amount: int, per_minute: int | None, now_s: float) -> float:
        """Until `amount` is there; for more than a whole bucket, until it is full."""
        if per_minute is None:
            self.left = None
            return 0.0
        filled = math.inf if self.left is None else self.left + (now_s - self.at_s) * per_minute / _MINUTE_S
        self.left, self.at_s = min(float(per_minute), filled), now_s
        return max(0.0, min(amount, per_minute) - self.left) * _MINUTE_S / per_minute

    def take(self, amount: int) -> None:
        if self.left is not None:
            self.left -= amount


class _Meter:
    __slots__ = ("active", "requests", "tokens")

    def __init__(self) -> None:
        self.active = 0
        self.requests, self.tokens = _Bucket(), _Bucket()


class Meters:
    """One for each tenant that has had a request: as many as the operator has named, at most."""

    def __init__(self) -> None:
        self._meters: dict[str, _Meter] = {}

    def begin(self, tenant: Tenant, prompt_tokens: int, now_s: float) -> None:
        """Count a request in; `end` must follow. Raises TenantOverQuota, having counted nothing."""
        meter, limits = self._meters.setdefault(tenant.name, _Meter()), tenant.limits
        if limits.concurrent_requests is not None and meter.active >= limits.concurrent_requests:
            raise TenantOverQuota(
                f"You have {meter.active} requests running, as many as you may.", code="concurrent_requests"
            )
        waits_s = {
            f"{limits.requests_per_minute} requests": meter.requests.wait_s(1, limits.requests_per_minute, now_s),
            f"{limits.tokens_per_minute} tokens": meter.tokens.wait_s(prompt_tokens, limits.tokens_per_minute, now_s),
        }
        longest = max(waits_s, key=waits_s.__getitem__)
        if waits_s[longest] > _ROUNDING_S:
            raise TenantOverQuota(
                f"You may take {longest} a minute.",
                retry_after_s=math.ceil(waits_s[longest]),
                code="rate_limit_exceeded",
            )
        meter.requests.take(1)
        meter.tokens.take(prompt_tokens)
        meter.active += 1

    def end(self, tenant: Tenant, output_tokens: int) -> None:
        meter = self._meters[tenant.name]
        meter.tokens.take(output_tokens)
        meter.active -= 1
