"""The loopback transport harms messages exactly as its plan says, and a closed link never sees a late one."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from kvstore.transfer.loopback import NO_FAULT, Fault, FaultPlan, LoopbackNetwork, LoopbackTransport, Message
from kvstore.transfer.transport import Buffer, Completion, Link, Outcome

DEADLINE_S = 10.0


class Ends:
    """A connected pair over a network with this plan."""

    def __init__(self, plan: FaultPlan) -> None:
        self.network = LoopbackNetwork(plan)
        self.transports = [LoopbackTransport(self.network) for _ in range(2)]
        self.seen: list[Completion] = []
        self._changed = threading.Condition()
        self.sender: Link = self.transports[0].open(self._note, same_host=True)
        self.receiver: Link = self.transports[1].open(self._note_receive, same_host=True)
        self.sender.connect(self.receiver.address)
        self.receiver.connect(self.sender.address)

    def _note(self, completion: Completion) -> None:
        assert completion.outcome in (Outcome.DONE, Outcome.FAILED)

    def _note_receive(self, completion: Completion) -> None:
        with self._changed:
            self.seen.append(completion)
            self._changed.notify_all()

    def wait(self, count: int) -> list[Completion]:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.seen) >= count, DEADLINE_S)
            return self.seen

    def flush(self) -> None:
        for transport in self.transports:
            transport.flush()


@pytest.fixture
def make() -> Iterator[Callable[[FaultPlan], Ends]]:
    made: list[Ends] = []

    def maker(plan: FaultPlan) -> Ends:
        made.append(Ends(plan))
        return made[-1]

    yield maker
    for ends in made:
        for transport in ends.transports:
            transport.close()


def first(fault: Fault) -> FaultPlan:
    return lambda message: fault if message.index == 0 else NO_FAULT


def data() -> Buffer:
    return np.arange(1, 101, dtype=np.uint8)


def test_plan_sees_each_message_once(make: Callable[[FaultPlan], Ends]) -> None:
    seen: list[Message] = []

    def plan(message: Message) -> Fault:
        seen.append(message)
        return NO_FAULT

    ends = make(plan)
    ends.sender.send(5, data())
    ends.sender.send(6, data()[:10])
    assert seen == [Message(0, 5, 100), Message(1, 6, 10)]


def test_dropped_message_never_arrives(make: Callable[[FaultPlan], Ends]) -> None:
    ends = make(first(Fault(drop=True)))
    lost, kept = np.zeros(100, np.uint8), np.zeros(100, np.uint8)
    ends.receiver.receive(1, lost)
    operation = ends.receiver.receive(2, kept)
    ends.sender.send(1, data())
    ends.sender.send(2, data())
    assert [completion.operation for completion in ends.wait(1)] == [operation]
    assert not lost.any()
    assert ends.network.dropped == 1


def test_duplicate_waits_for_a_second_receive(make: Callable[[FaultPlan], Ends]) -> None:
    ends = make(first(Fault(duplicate=True)))
    into = np.zeros((2, 100), np.uint8)
    ends.receiver.receive(1, into[0])
    ends.sender.send(1, data())
    ends.wait(1)
    assert not into[1].any()
    ends.receiver.receive(1, into[1])
    ends.wait(2)
    assert np.array_equal(into, [data(), data()])


def test_corrupt_message_differs_in_one_byte_and_leaves_the_source_alone(make: Callable[[FaultPlan], Ends]) -> None:
    ends = make(first(Fault(corrupt=True)))
    into, source = np.zeros(100, np.uint8), data()
    ends.receiver.receive(1, into)
    ends.sender.send(1, source)
    ends.wait(1)
    assert (into != source).sum() == 1
    assert np.array_equal(source, data())


def test_truncated_message_fills_only_its_part(make: Callable[[FaultPlan], Ends]) -> None:
    ends = make(first(Fault(truncate_to_bytes=30)))
    into = np.zeros(100, np.uint8)
    ends.receiver.receive(1, into)
    ends.sender.send(1, data())
    (completion,) = ends.wait(1)
    assert (completion.outcome, completion.num_bytes) == (Outcome.DONE, 30)
    assert np.array_equal(into[:30], data()[:30])
    assert not into[30:].any()


def test_delayed_message_is_overtaken(make: Callable[[FaultPlan], Ends]) -> None:
    ends = make(first(Fault(delay_s=0.05)))
    into = np.zeros((2, 100), np.uint8)
    operations = [ends.receiver.receive(tag, into[tag]) for tag in range(2)]
    for tag in range(2):
        ends.sender.send(tag, data())
    assert [completion.operation for completion in ends.wait(2)] == operations[::-1]


def test_late_message_arrives_when_released(make: Callable[[FaultPlan], Ends]) -> None:
    ends = make(first(Fault(late=True)))
    into = np.zeros(100, np.uint8)
    ends.receiver.receive(1, into)
    ends.sender.send(1, data())
    ends.flush()
    assert not into.any()
    ends.network.release_late()
    assert ends.wait(1)[0].outcome is Outcome.DONE
    assert np.array_equal(into, data())


def test_late_message_does_not_touch_a_closed_link(make: Callable[[FaultPlan], Ends]) -> None:
    ends = make(first(Fault(late=True)))
    into = np.zeros(100, np.uint8)
    ends.receiver.receive(1, into)
    ends.sender.send(1, data())
    ends.flush()
    ends.receiver.close()
    ends.network.release_late()
    ends.flush()
    assert not into.any()
    assert [completion.outcome for completion in ends.seen] == [Outcome.FAILED]
