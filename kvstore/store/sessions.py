"""The workers that are attached: a connection tells that a session has ended, a pidfd proves that the process has.

ATTACHED ── hangs up ─────> LOST: slots quarantined ── process ends, or attaches again ──> GONE: slots freed
        └────────────── process ends ────────────────────────┴─────────────────────────────────────┘
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Collection
from dataclasses import dataclass

from kvstore.errors import Unavailable
from kvstore.store.host_block import SlotRef
from kvstore.store.host_tier import HostTier

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Session:
    """`owner` is unique in the node's life: it names the holds of this session."""

    session_id: int
    owner: str
    pid: int
    pidfd: int


class SessionTable:
    """Use on the node's loop."""

    def __init__(self, host: HostTier, first_id: int = 0) -> None:
        """Ids grow from `first_id`: a session of another life of the node must mean nothing in this."""
        self._host = host
        self._loop = asyncio.get_running_loop()
        self._last_id = first_id
        self._attached: dict[int, Session] = {}
        self._watched: dict[int, Session] = {}  # by pidfd, until the process has ended or nothing is left to free

    def __len__(self) -> int:
        return len(self._attached)

    def open(self, name: str, pid: int) -> Session:
        """Raises Unavailable if there is no such process: its end could not be noticed."""
        try:
            pidfd = os.pidfd_open(pid)
        except (OSError, OverflowError) as error:
            raise Unavailable(
                f"process {pid} cannot be seen from here: a worker and its store node must share a PID namespace"
            ) from error
        self._last_id += 1
        session = Session(self._last_id, f"{name}#{self._last_id & 0xFFFFFFFF}", pid, pidfd)
        self._attached[session.session_id] = self._watched[pidfd] = session
        self._loop.add_reader(pidfd, self._gone, session)
        log.info("%s has attached (pid %d)", session.owner, pid)
        return session

    def resume(self, session_id: int, pid: int, still_writing: Collection[SlotRef]) -> None:
        """The process of a session that was lost says what it still writes: the rest is free."""
        for session in tuple(self._watched.values()):
            if session.session_id == session_id and session.pid == pid:
                self.lost(session)
                self._host.owner_gone(session.owner, still_writing)
                if not still_writing:
                    self._forget(session)

    def owner(self, session_id: int) -> str | None:
        """Whose session it is; None if it has ended."""
        session = self._attached.get(session_id)
        return None if session is None else session.owner

    def lost(self, session: Session) -> None:
        """Its connection has ended. Idempotent."""
        if self._attached.pop(session.session_id, None) is None:
            return
        quarantined = self._host.owner_lost(session.owner)
        log.info("%s has left; %d slots wait for the end of its process", session.owner, quarantined)
        if not quarantined:
            self._forget(session)

    def _gone(self, session: Session) -> None:
        self._forget(session)
        if self._attached.pop(session.session_id, None) is not None:
            self._host.owner_lost(session.owner)
        freed = self._host.owner_gone(session.owner)
        log.info("the process of %s has ended; %d slots are free again", session.owner, freed)

    def _forget(self, session: Session) -> None:
        if self._watched.pop(session.pidfd, None) is not None:
            self._loop.remove_reader(session.pidfd)
            os.close(session.pidfd)

    def close(self) -> None:
        for session in tuple(self._watched.values()):
            self._forget(session)
        self._attached.clear()
