"""A link on an asyncio loop: each operation is told once, on the loop, after the call that began it; a death shows."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Iterator

import numpy as np
import pytest

from kvstore.errors import LinkClosed, TransferError
from kvstore.transfer.loop_link import LoopLink
from kvstore.transfer.loopback import LoopbackNetwork, LoopbackTransport
from kvstore.transfer.transport import Completion, Outcome

DEADLINE_S = 20.0
MANY = 100  # more than are told in one turn of the loop


@pytest.fixture
def transports() -> Iterator[tuple[LoopbackTransport, LoopbackTransport]]:
    network = LoopbackNetwork()
    both = LoopbackTransport(network), LoopbackTransport(network)
    yield both
    for one in both:
        one.close()


@pytest.fixture
async def ends(transports: tuple[LoopbackTransport, LoopbackTransport]) -> tuple[LoopLink, LoopLink]:
    loop = asyncio.get_running_loop()
    here, there = (LoopLink(f"peer {n}", one, loop, same_host=True) for n, one in enumerate(transports))
    here.link.connect(there.link.address)
    there.link.connect(here.link.address)
    return here, there


class Told:
    """Outcomes by tag; the thread must be the loop's own."""

    def __init__(self, count: int) -> None:
        self.outcomes: dict[int, Outcome] = {}
        self._count = count
        self._all = asyncio.Event()
        self._thread = threading.get_ident()

    def at(self, tag: int, completion: Completion) -> None:
        assert threading.get_ident() == self._thread
        assert tag not in self.outcomes
        self.outcomes[tag] = completion.outcome
        if len(self.outcomes) == self._count:
            self._all.set()

    async def wait(self) -> set[Outcome]:
        await asyncio.wait_for(self._all.wait(), DEADLINE_S)
        return set(self.outcomes.values())


async def test_each_operation_is_told_once_and_on_the_loop(ends: tuple[LoopLink, LoopLink]) -> None:
    here, there = ends
    sent, received = Told(MANY), Told(MANY)
    into = np.zeros((MANY, 8), np.uint8)
    for tag in range(MANY):
        there.receive(tag, into[tag], lambda completion, tag=tag: received.at(tag, completion))  # type: ignore[misc]
        here.send(tag, np.full(8, tag, np.uint8), lambda completion, tag=tag: sent.at(tag, completion))  # type: ignore[misc]
    assert not sent.outcomes, "not from inside the call"
    assert await sent.wait() == await received.wait() == {Outcome.DONE}
    assert (into == np.arange(MANY, dtype=np.uint8)[:, None]).all()


async def test_closing_fails_what_is_open_and_refuses_what_comes(ends: tuple[LoopLink, LoopLink]) -> None:
    here, _ = ends
    told = Told(1)
    here.receive(1, np.zeros(8, np.uint8), lambda completion: told.at(1, completion))
    await asyncio.wait_for(here.close(), DEADLINE_S)
    assert await told.wait() == {Outcome.FAILED}
    assert here.close() is here.close()
    with pytest.raises(LinkClosed, match="peer 0"):
        here.send(2, np.zeros(8, np.uint8), lambda completion: None)
    with pytest.raises(LinkClosed, match="peer 0"):
        here.receive(2, np.zeros(8, np.uint8), lambda completion: None)


async def test_the_death_of_the_peers_process_is_told(ends: tuple[LoopLink, LoopLink]) -> None:
    here, there = ends
    child = await asyncio.create_subprocess_exec(sys.executable, "-c", "input()", stdin=asyncio.subprocess.PIPE)
    gone = asyncio.Event()
    here.watch(child.pid, gone.set)
    child.kill()
    await asyncio.wait_for(gone.wait(), DEADLINE_S)
    await child.wait()
    with pytest.raises(TransferError, match="peer 1"):
        there.watch(child.pid, gone.set)
    await here.close()
