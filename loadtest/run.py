"""One open-loop run: sessions are sent when they are due, whatever the server does."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Iterable
from dataclasses import dataclass

from loadtest.client import ask
from loadtest.outcome import Outcome
from loadtest.session import Session, request_of
from loadtest.target import Target


@dataclass(frozen=True, slots=True)
class Run:
    """
    Attributes:
        outcomes: of every request that was due, the failed ones too.
        offered_s: how long sessions were sent.
        elapsed_s: until the last outcome.
        client_cpu_s: CPU time of this process in `elapsed_s`.
    """

    outcomes: tuple[Outcome, ...]
    offered_s: float
    elapsed_s: float
    client_cpu_s: float


async def run_open(target: Target, sessions: Iterable[Session], duration_s: float, timeout_s: float) -> Run:
    """Sends what is due within `duration_s`, and waits for the answers; `timeout_s` bounds each request."""
    due = list(itertools.takewhile(lambda session: session.at_s < duration_s, sessions))
    began_s, began_cpu_s = time.monotonic(), time.process_time()
    async with asyncio.TaskGroup() as group:
        tasks = []
        for session in due:
            await asyncio.sleep(began_s + session.at_s - time.monotonic())
            late_s = time.monotonic() - began_s - session.at_s
            tasks.append(group.create_task(_converse(target, session, timeout_s, late_s)))
    outcomes = tuple(outcome for task in tasks for outcome in task.result())
    return Run(outcomes, duration_s, time.monotonic() - began_s, time.process_time() - began_cpu_s)


async def run_closed(target: Target, sessions: Iterable[Session], clients: int, count: int, timeout_s: float) -> Run:
    """`count` sessions by `clients`, each with one at a time; when they were due is of no account."""
    waiting = itertools.islice(sessions, count)

    async def client() -> list[Outcome]:
        return [outcome for session in waiting for outcome in await _converse(target, session, timeout_s, 0.0)]

    began_s, began_cpu_s = time.monotonic(), time.process_time()
    results = await asyncio.gather(*(client() for _ in range(clients)))
    elapsed_s = time.monotonic() - began_s
    outcomes = tuple(outcome for result in results for outcome in result)
    return Run(outcomes, elapsed_s, elapsed_s, time.process_time() - began_cpu_s)


async def _converse(target: Target, session: Session, timeout_s: float, late_s: float) -> list[Outcome]:
    """All turns; a failed one ends the session, and the turns that it would have had were never due."""
    outcomes: list[Outcome] = []
    for number, turn in enumerate(session.turns):
        await asyncio.sleep(turn.think_s)
        request = request_of(session, number, [outcome.text for outcome in outcomes])
        outcomes.append(await ask(target, request.path, request.body, timeout_s, late_s if number == 0 else 0.0))
        if not outcomes[-1].ok:
            break
    return outcomes
