"""A dead or frozen peer process costs its own link only: operations end, memory is let alone, nothing leaks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvstore.transfer.transport import Buffer, Completion, Link, Outcome, Transport
from tests.support.transports import KINDS, make_transport, reads, same_host

PEER = Path(__file__).with_name("peer_process.py")
COUNT, SIZE = 128, 1 << 20
CLOSE_BOUND_S = 5.0
DEATH_BOUND_S = 10.0


class Peer:
    """The other process; killed at the end, whatever happened."""

    def __init__(self, role: str, kind: str, link: Link, count: int = COUNT) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(PEER), role],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        )
        order = {"address": link.address.hex(), "kind": kind, "count": count, "size": SIZE}
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        link.connect(bytes.fromhex(self.event()["address"]))

    def event(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        event: dict[str, Any] = json.loads(self.process.stdout.readline())
        return event

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


class Tally:
    """Counts completions; when the third one comes, runs `at_third` on the progress thread, amid the transfer."""

    def __init__(self, at_third: Callable[[], None]) -> None:
        self.at_third = at_third
        self.outcomes: dict[int, Outcome] = {}
        self.changed = threading.Condition()

    def __call__(self, completion: Completion) -> None:
        with self.changed:
            assert completion.operation not in self.outcomes
            self.outcomes[completion.operation] = completion.outcome
            if len(self.outcomes) == 3:
                self.at_third()
            self.changed.notify_all()

    def wait(self, count: int, bound_s: float) -> Counter[Outcome]:
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.outcomes) >= count, bound_s), Counter(self.outcomes.values())
            return Counter(self.outcomes.values())

    def wait_for_quiet(self) -> None:
        """Until no completion has come for 200 ms."""
        with self.changed:
            while self.changed.wait(0.2):
                pass


@pytest.fixture(params=[kind for kind in KINDS if "inline" not in kind], ids=lambda kind: kind.replace(" ", "-"))
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def memory() -> Buffer:
    """`[COUNT + 2, SIZE]`: what is received into, and two blocks for the bystander."""
    return np.zeros((COUNT + 2, SIZE), np.uint8)


@pytest.fixture
def transport(kind: str, memory: Buffer) -> Iterator[Transport]:
    transport = make_transport(kind, memory.reshape(-1))
    yield transport
    transport.close()


@pytest.fixture
def bystander(transport: Transport, kind: str, memory: Buffer) -> Iterator[Callable[[], None]]:
    """A second link of the same transport; the call proves that it still works."""
    other = make_transport(kind, memory.reshape(-1))
    ended: dict[int, threading.Event] = {}

    def handler(completion: Completion) -> None:
        assert completion.outcome is Outcome.DONE
        ended[completion.operation].set()

    mine, theirs = transport.open(handler, same_host=True), other.open(lambda _completion: None, same_host=True)
    mine.connect(theirs.address)
    theirs.connect(mine.address)
    into, data = memory[COUNT], memory[COUNT + 1]

    def check() -> None:
        into[:], data[:] = 0, 7
        ended[len(ended) + 1] = done = threading.Event()
        mine.receive(1, into)
        theirs.send(1, data)
        assert done.wait(CLOSE_BOUND_S)
        assert np.array_equal(into, data)

    check()
    yield check
    check()
    other.close()


def run_into(transport: Transport, kind: str, memory: Buffer, number: int) -> tuple[Peer, Tally, Link]:
    """Receive from a peer that gets the signal in the middle of the transfer."""
    started = threading.Event()
    peers: list[Peer] = []

    def hit() -> None:
        assert started.wait(CLOSE_BOUND_S)
        peers[0].signal(number)

    tally = Tally(hit)
    link = transport.open(tally, same_host=same_host(kind))
    for n in range(COUNT):
        link.receive(n, memory[n])
    peers.append(Peer("send", kind, link))
    started.set()
    return peers[0], tally, link


def test_killed_sender_fails_what_is_left_and_nothing_else(
    transport: Transport, bystander: Callable[[], None], kind: str, memory: Buffer
) -> None:
    peer, tally, link = run_into(transport, kind, memory, signal.SIGKILL)
    try:
        peer.process.wait(DEATH_BOUND_S)
        outcomes = tally.wait(COUNT, DEATH_BOUND_S)
        assert outcomes[Outcome.FAILED] > 0
        assert outcomes[Outcome.DONE] + outcomes[Outcome.FAILED] == COUNT
        for operation, outcome in tally.outcomes.items():
            if outcome is Outcome.DONE:
                assert (memory[operation - 1] == 0xAB).all()
        bystander()
        assert "lost" in link.describe()
        late = link.receive(5, memory[0])
        tally.wait(COUNT + 1, CLOSE_BOUND_S)
        assert tally.outcomes[late] is Outcome.FAILED
        link.close()
    finally:
        peer.end()


def test_frozen_sender_cannot_write_after_our_close(
    transport: Transport, bystander: Callable[[], None], kind: str, memory: Buffer
) -> None:
    peer, tally, link = run_into(transport, kind, memory, signal.SIGSTOP)
    try:
        tally.wait(3, DEATH_BOUND_S)
        if not reads(kind):  # a frozen process can be read from: then the close comes amid that
            tally.wait_for_quiet()
            assert len(tally.outcomes) < COUNT
        begin_s = time.monotonic()
        link.close()
        assert time.monotonic() - begin_s < CLOSE_BOUND_S
        assert len(tally.outcomes) == COUNT
        memory[:COUNT] = 0x55
        bystander()
        peer.signal(signal.SIGCONT)
        assert peer.event() == {"started": COUNT}
        # Traffic on the other link drives the progress thread while the sender is awake again.
        until_s = time.monotonic() + 2
        while time.monotonic() < until_s:
            bystander()
        assert (memory[:COUNT] == 0x55).all()
        assert peer.process.poll() is None
    finally:
        peer.end()


def test_message_nobody_asked_for_does_not_hold_up_close(
    transport: Transport, bystander: Callable[[], None], kind: str, memory: Buffer
) -> None:
    tally = Tally(lambda: None)
    link = transport.open(tally, same_host=same_host(kind))
    peer = Peer("send", kind, link)
    try:
        assert peer.event() == {"started": COUNT}
        bystander()
        peer.signal(signal.SIGSTOP)
        begin_s = time.monotonic()
        link.close()
        assert time.monotonic() - begin_s < CLOSE_BOUND_S
        assert not tally.outcomes
    finally:
        peer.end()


def test_killed_receiver_fails_our_sends(
    transport: Transport, bystander: Callable[[], None], kind: str, memory: Buffer
) -> None:
    tally = Tally(lambda: peer.signal(signal.SIGKILL))
    link = transport.open(tally, same_host=same_host(kind))
    peer = Peer("receive", kind, link)
    try:
        assert peer.event() == {"started": COUNT}
        data = memory[0]
        for n in range(2 * COUNT):
            link.send(n % COUNT if n < COUNT else n, data)
        peer.process.wait(DEATH_BOUND_S)
        outcomes = tally.wait(2 * COUNT, DEATH_BOUND_S)
        assert outcomes[Outcome.FAILED] > 0
    finally:
        peer.end()


@pytest.mark.parametrize("amid", [False, True], ids=["before", "amid"])
def test_frozen_receiver_costs_no_spinning_and_close_ends_our_sends(
    transport: Transport, bystander: Callable[[], None], kind: str, memory: Buffer, amid: bool
) -> None:
    tally = Tally(lambda: peer.signal(signal.SIGSTOP) if amid else None)
    link = transport.open(tally, same_host=same_host(kind))
    peer = Peer("receive", kind, link)
    try:
        assert peer.event() == {"started": COUNT}
        if not amid:
            peer.signal(signal.SIGSTOP)
        data = memory[0]
        for n in range(COUNT):
            link.send(n, data)
        tally.wait_for_quiet()
        cpu_s, wall_s = time.process_time(), time.monotonic()
        tally.wait_for_quiet()
        threading.Event().wait(1)
        assert time.process_time() - cpu_s < 0.25 * (time.monotonic() - wall_s)
        begin_s = time.monotonic()
        link.close()
        assert time.monotonic() - begin_s < CLOSE_BOUND_S
        assert len(tally.outcomes) == COUNT
        bystander()
    finally:
        peer.end()


def test_links_leave_nothing_behind(transport: Transport, kind: str, memory: Buffer) -> None:
    def round_trip() -> None:
        ends = [transport.open(Tally(lambda: None), same_host=same_host(kind)) for _ in range(2)]
        ends[0].connect(ends[1].address)
        ends[1].connect(ends[0].address)
        ends[1].receive(1, memory[0])
        ends[0].send(2, memory[1])  # never received
        for end in ends:
            end.close()

    def held() -> tuple[int, int, int]:
        maps = Path("/proc/self/maps").read_text().count("ucx_shm")
        return len(os.listdir("/proc/self/fd")), threading.active_count(), maps

    round_trip()
    before = held()
    for _ in range(20):
        round_trip()
    assert held() == before
