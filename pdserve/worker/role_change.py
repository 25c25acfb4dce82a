"""A worker's role, and how it changes while the worker serves. Weights, pool and cached blocks stay what they are.

    SERVING ── ask ──> DRAINING: nothing new is taken ── nothing is left ──> SERVING in the new role
                          └ drain_s is over: what is left is refused, so that its router moves it ┘

Until nothing is left the role is the old one: links to peers stay, hand-overs end by their tickets.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from pdserve.protocol import worker_pb2 as pb
from pdserve.worker.requests import RequestTable

log = logging.getLogger(__name__)

MAX_DRAIN_S = 600.0
_LOOK_S = 0.05


class RoleChangeRefused(Exception):
    """One sentence that says why."""


class RoleKeeper:
    """Use on the asyncio loop only."""

    def __init__(self, role: pb.Role, requests: RequestTable, tell: Callable[[pb.RoleReport], None]) -> None:
        """`tell` hears of each change, also of its beginning."""
        self._role = role
        self._next_role = pb.ROLE_UNSPECIFIED
        self._requests = requests
        self._tell = tell
        self._task: asyncio.Task[None] | None = None

    @property
    def takes_requests(self) -> bool:
        return self._next_role == pb.ROLE_UNSPECIFIED

    @property
    def why_not(self) -> str:
        """Why it takes no requests."""
        return f"it drains to become a {pb.Role.Name(self._next_role).lower()} worker"

    def report(self) -> pb.RoleReport:
        return pb.RoleReport(role=self._role, next_role=self._next_role)

    def ask(self, role: pb.Role, drain_s: float) -> pb.RoleReport:
        """Begin to change; asking once more for the same role changes nothing.

        Raises:
            RoleChangeRefused: another change is under way.
            ValueError: no such role, or no such time.
        """
        if role not in (pb.PREFILL, pb.DECODE, pb.MIXED):
            raise ValueError("a worker's role is prefill, decode or mixed")
        if not 0.0 <= drain_s <= MAX_DRAIN_S:
            raise ValueError(f"drain_s lies between 0 and {MAX_DRAIN_S:g}")
        if not self.takes_requests and role != self._next_role:
            raise RoleChangeRefused(self.why_not)
        if self.takes_requests and role != self._role:
            self._next_role = role
            self._told()
            self._task = asyncio.create_task(self._drain(time.monotonic() + drain_s), name="role change")
        return self.report()

    def stop(self) -> None:
        """The worker ends."""
        if self._task is not None:
            self._task.cancel()

    async def _drain(self, until_s: float) -> None:
        while not self._requests.idle:
            if time.monotonic() >= until_s:
                for entry in self._requests:
                    self._requests.refuse(entry, self.why_not)
            await asyncio.sleep(_LOOK_S)
        self._role, self._next_role = self._next_role, pb.ROLE_UNSPECIFIED
        self._told()

    def _told(self) -> None:
        report = self.report()
        log.info("role=%s next_role=%s", pb.Role.Name(report.role), pb.Role.Name(report.next_role))
        self._tell(report)
