"""When a router says that it is ready: when a request would be served as its deployment means it to be.

Workers of one role alone serve whole requests, but right after a start the other role is usually on its way. So a
router waits for each role that it expects, and for the first link between them, a bounded time: a role that is really
missing is done without. Whoever was ready once stays so while a worker is left.
"""

from __future__ import annotations

from collections.abc import Sequence

from router.limits import FleetLimits
from router.member import Member
from router.policy import Role

_PAIR = frozenset((Role.PREFILL, Role.DECODE))


class Readiness:
    def __init__(self, expected: frozenset[Role], limits: FleetLimits) -> None:
        """`expected` are the roles of the deployment; none: only prefill and decode expect each other."""
        self._expected = expected
        self._limits = limits
        self._settled = False  # all that was waited for is there, or did not come in time

    def why_not(self, usable: Sequence[Member], now_s: float) -> str:
        """In clear text; empty: it is ready. `usable` are the workers that can be sent something new."""
        if not usable:
            self._settled = False
            return "no worker has joined"
        if self._settled:
            return ""
        why = self._waits_for_role(usable, now_s) or self._waits_for_link(usable, now_s)
        self._settled = not why
        return why

    def _waits_for_role(self, usable: Sequence[Member], now_s: float) -> str:
        roles = frozenset(member.role for member in usable)
        missing = self._expected - roles if self._expected else _PAIR - roles if roles < _PAIR else frozenset()
        limit_s = self._limits.expect_s if self._expected else self._limits.warmup_s
        left_s = min(member.joined_s for member in usable) + limit_s - now_s
        if not missing or left_s <= 0.0:
            return ""
        names = " and ".join(sorted(f"a {role.value} worker" for role in missing))
        return f"waiting for {names}, at most {left_s:.0f} s more; then the others serve whole requests"

    def _waits_for_link(self, usable: Sequence[Member], now_s: float) -> str:
        roles = {member.role for member in usable}
        if not roles >= _PAIR or Role.MIXED in roles or any(member.partners or member.links for member in usable):
            return ""
        left_s = max(member.joined_s for member in usable) + self._limits.warmup_s - now_s
        return f"waiting for a link between the roles, at most {left_s:.0f} s more" if left_s > 0.0 else ""
