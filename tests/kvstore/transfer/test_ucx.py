"""The UCX transport uses what it says it uses, says what is missing, and leaves the other threads room to run."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest

from kvstore.errors import Unavailable
from kvstore.transfer.transport import Completion, Link, Outcome
from kvstore.transfer.ucx import UcxTransport

DEADLINE_S = 20.0


@pytest.fixture
def transport() -> Iterator[UcxTransport]:
    transport = UcxTransport()
    yield transport
    transport.close()


def pair(transport: UcxTransport, done: threading.Semaphore, *, same_host: bool) -> tuple[Link, Link]:
    def handler(completion: Completion) -> None:
        assert completion.outcome is Outcome.DONE
        done.release()

    ends = tuple(transport.open(handler, same_host=same_host) for _ in range(2))
    ends[0].connect(ends[1].address)
    ends[1].connect(ends[0].address)
    return ends[0], ends[1]


@pytest.mark.parametrize(("same_host", "expected"), [(True, "posix/memory"), (False, "tcp/")])
def test_describe_tells_the_transport_in_use(transport: UcxTransport, same_host: bool, expected: str) -> None:
    ends = pair(transport, threading.Semaphore(0), same_host=same_host)
    assert ends[0].describe().startswith(expected)
    ends[0].close()
    assert "closed" in ends[0].describe()


@pytest.mark.parametrize("missing", ["ucxx._lib.libucxx", "ucxx._lib.arr"])
def test_absent_ucxx_gives_one_clear_sentence(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(Unavailable, match="needs the package ucxx"):
        UcxTransport()


def test_idle_transport_costs_next_to_no_cpu(transport: UcxTransport) -> None:
    pair(transport, threading.Semaphore(0), same_host=True)
    begin_s = time.process_time()
    threading.Event().wait(1.0)
    assert time.process_time() - begin_s < 0.2


@pytest.mark.parametrize("same_host", [True, False])
async def test_event_loop_runs_on_while_blocks_move(transport: UcxTransport, same_host: bool) -> None:
    done = threading.Semaphore(0)
    sender, receiver = pair(transport, done, same_host=same_host)
    count, size = 200, 1 << 20
    data, into = np.full((count, size), 7, np.uint8), np.zeros((count, size), np.uint8)
    for n in range(count):
        receiver.receive(n, into[n])
        sender.send(n, data[n])
    ticks, ended = 0, 0
    until_s = time.monotonic() + DEADLINE_S
    while ended < 2 * count and time.monotonic() < until_s:
        await asyncio.sleep(0.001)
        ticks += 1
        while done.acquire(blocking=False):
            ended += 1
    assert ended == 2 * count
    assert ticks > 5
    assert np.array_equal(into, data)
