"""Every transport keeps the contract of kvstore/transfer/transport.py: one completion an operation, isolated links."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pytest

from kvstore.errors import LinkClosed, TransferError
from kvstore.transfer.loopback import LoopbackNetwork, LoopbackTransport
from kvstore.transfer.transport import Buffer, Completion, Link, Outcome, Transport
from tests.support.transports import KINDS, make_transport, same_host

DEADLINE_S = 20.0
SIZES = (1, 4096, 368_640, 3 << 20)


ARENA = np.zeros(32 << 20, np.uint8)


class Arena:
    used = 0  # bytes


class Recorder:
    """Keeps completions by operation and fails the test on a second one."""

    def __init__(self) -> None:
        self.completions: dict[int, Completion] = {}
        self.threads: set[str] = set()
        self.repeated = 0
        self._changed = threading.Condition()

    def __call__(self, completion: Completion) -> None:
        with self._changed:
            self.repeated += completion.operation in self.completions
            self.completions[completion.operation] = completion
            self.threads.add(threading.current_thread().name)
            self._changed.notify_all()

    def wait(self, *operations: int) -> list[Outcome]:
        with self._changed:
            assert self._changed.wait_for(lambda: set(operations) <= set(self.completions), DEADLINE_S)
        assert self.repeated == 0
        return [self.completions[operation].outcome for operation in operations]


@dataclass
class End:
    transport: Transport
    link: Link
    done: Recorder


Opener = Callable[[int], End]


@pytest.fixture(params=("loopback", *KINDS), ids=lambda kind: kind.replace(" ", "-"))
def open_end(request: pytest.FixtureRequest) -> Iterator[Opener]:
    """Opens links on transport 0 or 1 of one network."""
    network, kind = LoopbackNetwork(), request.param
    Arena.used = 0
    transports = [LoopbackTransport(network) if kind == "loopback" else make_transport(kind, ARENA) for _ in range(2)]

    def opener(which: int) -> End:
        done = Recorder()
        return End(transports[which], transports[which].open(done, same_host=same_host(kind)), done)

    yield opener
    for transport in transports:
        transport.close()


@pytest.fixture
def pair(open_end: Opener) -> tuple[End, End]:
    return connected(open_end)


def connected(open_end: Opener) -> tuple[End, End]:
    sender, receiver = open_end(0), open_end(1)
    sender.link.connect(receiver.link.address)
    receiver.link.connect(sender.link.address)
    return sender, receiver


def zeros(size: int) -> Buffer:
    """Of the arena, where the transport knows the memory beforehand; no two are the same while the test runs."""
    start, Arena.used = Arena.used, Arena.used + size
    taken = ARENA[start : start + size]
    assert taken.size == size
    taken[:] = 0
    return taken


def pattern(size: int, seed: int) -> Buffer:
    made = zeros(size)
    made[:] = np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)
    return made


def exchange(sender: End, receiver: End, tag: int, size: int) -> None:
    data, into = pattern(size, tag), zeros(size)
    received = receiver.link.receive(tag, into)
    sent = sender.link.send(tag, data)
    assert receiver.done.wait(received) == [Outcome.DONE]
    assert sender.done.wait(sent) == [Outcome.DONE]
    assert np.array_equal(into, data)


@pytest.mark.parametrize("size", SIZES)
def test_message_arrives_whole_in_both_directions(pair: tuple[End, End], size: int) -> None:
    exchange(*pair, tag=2**64 - 1, size=size)
    exchange(*reversed(pair), tag=7, size=size)


@pytest.mark.parametrize("size", SIZES)
def test_message_sent_before_its_receive_is_posted_arrives(pair: tuple[End, End], size: int) -> None:
    sender, receiver = pair
    data, into = pattern(size, 3), zeros(size)
    sent = sender.link.send(3, data)
    exchange(sender, receiver, tag=4, size=8)
    received = receiver.link.receive(3, into)
    assert receiver.done.wait(received) == [Outcome.DONE]
    assert sender.done.wait(sent) == [Outcome.DONE]
    assert np.array_equal(into, data)


def test_batch_goes_where_its_tags_say(pair: tuple[End, End]) -> None:
    sender, receiver = pair
    count, size = 64, 100_000
    data, into = pattern(count * size, 0).reshape(count, size), zeros(count * size).reshape(count, size)
    received = [receiver.link.receive(9 << 16 | n, into[n]) for n in reversed(range(count))]
    sent = [sender.link.send(9 << 16 | n, data[n]) for n in range(count)]
    assert set(receiver.done.wait(*received)) == {Outcome.DONE}
    assert set(sender.done.wait(*sent)) == {Outcome.DONE}
    assert np.array_equal(into, data)
    assert receiver.done.completions[received[0]].num_bytes == size


def test_completions_come_on_the_transports_thread(pair: tuple[End, End]) -> None:
    exchange(*pair, tag=1, size=100)
    (thread,) = pair[1].done.threads
    assert thread != threading.current_thread().name


def test_message_larger_than_the_buffer_is_truncated(pair: tuple[End, End]) -> None:
    sender, receiver = pair
    for tag, size in ((5, 100), (6, 1 << 20)):
        beyond = zeros(2 * size)
        received = receiver.link.receive(tag, beyond[: size // 2])
        sender.link.send(tag, pattern(size, tag))
        assert receiver.done.wait(received) == [Outcome.TRUNCATED]
        assert not beyond[size // 2 :].any()
    exchange(sender, receiver, tag=7, size=1000)


def test_cancelled_receive_leaves_its_buffer_alone(pair: tuple[End, End]) -> None:
    sender, receiver = pair
    into, other = zeros(1000), zeros(1000)
    cancelled, kept = receiver.link.receive(5, into), receiver.link.receive(6, other)
    receiver.link.cancel(cancelled)
    assert receiver.done.wait(cancelled) == [Outcome.CANCELLED]
    sender.link.send(5, pattern(1000, 5))
    sent = sender.link.send(6, pattern(1000, 6))
    assert receiver.done.wait(kept) == [Outcome.DONE]
    assert sender.done.wait(sent) == [Outcome.DONE]
    assert not into.any()


def test_cancel_of_what_has_ended_changes_nothing(pair: tuple[End, End]) -> None:
    exchange(*pair, tag=1, size=100)
    for end in pair:
        for operation in tuple(end.done.completions):
            end.link.cancel(operation)
    pair[1].link.cancel(12345)
    exchange(*pair, tag=2, size=100)
    assert pair[1].done.repeated == 0


def test_close_fails_what_is_open_before_it_returns(pair: tuple[End, End]) -> None:
    sender, receiver = pair
    into = zeros(1 << 20)
    received = [receiver.link.receive(tag, into) for tag in range(10)]
    receiver.link.close()
    assert {receiver.done.completions[operation].outcome for operation in received} == {Outcome.FAILED}
    sent = sender.link.send(3, pattern(1 << 20, 3))
    sender.link.close()
    assert sender.done.completions[sent].outcome in (Outcome.DONE, Outcome.FAILED)
    assert not into.any()


def test_closed_link_refuses_and_close_is_idempotent(pair: tuple[End, End]) -> None:
    link = pair[0].link
    link.close()
    link.close()
    buffer = zeros(8)
    with pytest.raises(LinkClosed):
        link.send(1, buffer)
    with pytest.raises(LinkClosed):
        link.receive(1, buffer)
    with pytest.raises(LinkClosed):
        link.connect(pair[1].link.address)
    link.cancel(1)


def test_links_of_one_transport_are_isolated(open_end: Opener) -> None:
    first, second = connected(open_end), connected(open_end)
    into = zeros(1000)
    second[1].link.receive(5, into)
    exchange(*first, tag=5, size=1000)
    assert not into.any()
    first[1].link.close()
    first[0].link.close()
    second[0].link.send(5, pattern(1000, 5))
    exchange(*second, tag=6, size=1 << 20)


def test_close_from_a_handler_works(open_end: Opener) -> None:
    sender, receiver = open_end(0), open_end(1)
    closed = threading.Event()

    def close_it(_completion: Completion) -> None:
        link.close()
        closed.set()

    link = receiver.transport.open(close_it, same_host=True)
    operation = link.receive(1, zeros(8))
    link.cancel(operation)
    assert closed.wait(DEADLINE_S)
    sender.link.connect(receiver.link.address)
    receiver.link.connect(sender.link.address)
    exchange(sender, receiver, tag=1, size=1000)


def test_failing_handler_does_not_stop_the_other_links(open_end: Opener) -> None:
    sender, receiver = connected(open_end)

    def fail(_completion: Completion) -> None:
        raise RuntimeError("a bug of the caller")

    link = receiver.transport.open(fail, same_host=True)
    link.cancel(link.receive(1, zeros(8)))
    exchange(sender, receiver, tag=1, size=1000)


@pytest.mark.parametrize(
    ("tag", "buffer"),
    [
        (-1, np.zeros(8, np.uint8)),
        (1 << 64, np.zeros(8, np.uint8)),
        (1, np.zeros(0, np.uint8)),
        (1, np.zeros(8, np.uint16)),
        (1, np.zeros((2, 4), np.uint8)),
        (1, np.zeros(8, np.uint8)[::2]),
    ],
)
def test_unusable_operation_is_refused(pair: tuple[End, End], tag: int, buffer: Buffer) -> None:
    with pytest.raises(ValueError, match=r"tag|buffer"):
        pair[0].link.send(tag, buffer)
    with pytest.raises(ValueError, match=r"tag|buffer"):
        pair[0].link.receive(tag, buffer)


def test_read_only_buffer_can_be_sent_but_not_received_into(pair: tuple[End, End]) -> None:
    buffer = pattern(8, 1)
    buffer.flags.writeable = False
    with pytest.raises(ValueError, match="writable"):
        pair[1].link.receive(1, buffer)
    assert pair[0].done.wait(pair[0].link.send(1, buffer)) == [Outcome.DONE]


def test_send_before_connect_and_a_wrong_address_are_errors(open_end: Opener) -> None:
    link, other = open_end(0).link, open_end(1).link
    with pytest.raises(TransferError):
        link.send(1, zeros(8))
    damaged = bytes([other.address[0] ^ 1]) + other.address[1:]
    for address in (b"", b"nonsense", other.address[:-1], damaged, other.address + b"x"):
        with pytest.raises(TransferError):
            link.connect(address)
    link.connect(other.address)
    with pytest.raises(TransferError):
        link.connect(other.address)


def test_receive_may_be_posted_before_connect(open_end: Opener) -> None:
    sender, receiver = open_end(0), open_end(1)
    into = zeros(100)
    received = receiver.link.receive(1, into)
    sender.link.connect(receiver.link.address)
    receiver.link.connect(sender.link.address)
    sender.link.send(1, pattern(100, 1))
    assert receiver.done.wait(received) == [Outcome.DONE]


def test_describe_names_what_is_used(pair: tuple[End, End]) -> None:
    assert pair[0].link.describe()


def test_transport_close_ends_links_and_refuses_new_ones(open_end: Opener) -> None:
    sender, receiver = connected(open_end)
    received = receiver.link.receive(1, zeros(8))
    receiver.transport.close()
    receiver.transport.close()
    assert receiver.done.completions[received].outcome is Outcome.FAILED
    receiver.link.close()
    with pytest.raises(LinkClosed):
        receiver.link.receive(1, zeros(8))
    with pytest.raises(LinkClosed):
        receiver.transport.open(receiver.done, same_host=True)
    sender.link.close()


def test_each_operation_completes_once_when_close_races_with_callers(open_end: Opener) -> None:
    sender, receiver = connected(open_end)
    accepted: list[int] = []

    def post() -> None:
        try:
            while len(accepted) < 5000:
                accepted.append(receiver.link.receive(len(accepted), zeros(8)))
        except LinkClosed:
            return

    thread = threading.Thread(target=post)
    thread.start()
    sender.link.send(0, pattern(8, 0))
    receiver.link.close()
    thread.join(DEADLINE_S)
    assert set(receiver.done.wait(*accepted)) <= {Outcome.FAILED, Outcome.DONE}
    assert len(receiver.done.completions) == len(accepted)
