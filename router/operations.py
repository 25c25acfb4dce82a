"""What operators look at and do: the pools of the workers by block state, taking a worker out of use, and its role.

A drained worker gets nothing new from this router; what it has goes on. It stays so, over restarts of the worker too,
until that is undone or the router ends. Other routers are asked one by one.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import time
from typing import Any

from router.fleet import Fleet
from router.http.service import RoleName
from router.member import Member, check_role
from router.policy import Role
from router.roles import RoleChanger

_KEEP_S = 1.0  # however many consoles are open
_ASK_S = 2.0
_LONGEST = 4 << 20  # bytes of an answer


class Operations:
    """Implements `router.http.service.Operations`."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._pools: tuple[float, dict[str, Any]] = (-_KEEP_S, {})
        self._lock = asyncio.Lock()

    async def pools(self) -> dict[str, Any]:
        """Blocks by state of every worker in use, as their ledgers say, at most a second old."""
        async with self._lock:
            if time.monotonic() - self._pools[0] >= _KEEP_S:
                found = await asyncio.gather(*(_pool(member) for member in self._fleet.known() if member.in_use))
                self._pools = time.monotonic(), {"workers": list(found)}
        return self._pools[1]

    def drain(self, worker_id: str, drained: bool) -> bool:
        """False if no worker has this id."""
        return self._fleet.drain(worker_id, drained)

    async def change_role(self, worker_id: str, role: RoleName, *, drain_s: float, force: bool) -> dict[str, Any]:
        report = await RoleChanger(self._fleet).change(worker_id, Role(role), drain_s=drain_s, force=force)
        now, following = check_role(report.role), report.next_role
        return {
            "worker_id": worker_id,
            "role": now.value,
            "next_role": check_role(following).value if following else None,
            "state": "draining" if following else "ready",
        }


async def _pool(member: Member) -> dict[str, Any]:
    entry: dict[str, Any] = {"worker_id": member.worker_id, "total_blocks": member.hello.num_blocks}
    try:
        ledger = await asyncio.to_thread(_ledger, member.hello.admin_address)
        states = {str(state): int(count) for state, count in ledger["by_state"].items()}
    except (http.client.HTTPException, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return entry | {"by_state": {}, "error": f"Its admin port does not tell: {error}"[:200]}
    return entry | {"by_state": states, "error": ""}


def _ledger(address: str) -> Any:
    """What is there is a peer's answer, and may be anything."""
    with contextlib.closing(http.client.HTTPConnection(address, timeout=_ASK_S)) as connection:
        connection.request("GET", "/ledger")
        return json.loads(connection.getresponse().read(_LONGEST))
