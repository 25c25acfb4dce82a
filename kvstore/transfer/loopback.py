"""An in-process transport with faults that tests inject.

Two `LoopbackTransport`s share a `LoopbackNetwork`; its plan looks at each message and answers with a `Fault`. How a
message is harmed depends on the plan only, so a run with one sender is repeatable.
"""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from kvstore.errors import LinkClosed, TransferError
from kvstore.transfer.contract import MAX_OPEN_OPERATIONS, check_operation, deliver
from kvstore.transfer.transport import Buffer, Completion, CompletionHandler, DeviceBuffer, Memory, Outcome

MAX_UNEXPECTED = 1 << 10  # messages of one link for which no receive is posted; further ones are dropped
_DEADLINE_S = 30.0


@dataclass(frozen=True, slots=True)
class Fault:
    """What happens to one message; its send is DONE all the same, as on a lossy network.

    A late message waits for `LoopbackNetwork.release_late`. Of a truncated one only the first bytes arrive.
    """

    delay_s: float = 0.0
    drop: bool = False
    duplicate: bool = False
    corrupt: bool = False
    truncate_to_bytes: int | None = None
    late: bool = False


NO_FAULT = Fault()


@dataclass(frozen=True, slots=True)
class Message:
    """What a plan sees; `index` counts the network's messages from 0."""

    index: int
    tag: int
    num_bytes: int


FaultPlan = Callable[[Message], Fault]


def no_faults(_message: Message) -> Fault:
    return NO_FAULT


class LoopbackNetwork:
    """Who is reachable at which address. Its lock guards all links on it, so no byte lands after a close."""

    def __init__(self, plan: FaultPlan = no_faults) -> None:
        self.lock = threading.RLock()
        self.links: dict[bytes, LoopbackLink] = {}
        self.dropped = 0  # messages that met no link, or one with too many unexpected messages
        self._plan = plan
        self._late: list[Callable[[], None]] = []
        self._num_messages = itertools.count()
        self._num_links = itertools.count(1)

    def join(self, link: LoopbackLink) -> bytes:
        with self.lock:
            address = f"loopback:{next(self._num_links)}".encode()
            self.links[address] = link
            return address

    def fault_for(self, tag: int, num_bytes: int) -> Fault:
        return self._plan(Message(next(self._num_messages), tag, num_bytes))

    def carry(self, address: bytes, tag: int, payload: Buffer, fault: Fault) -> None:
        """Bring a copy of a message to its link, as the fault says; with the lock held."""
        arrive = partial(self._arrive, address, tag, _harm(payload, fault))
        if fault.drop:
            self.dropped += 1
        elif fault.late:
            self._late.append(arrive)
        else:
            arrive()
            if fault.duplicate:
                arrive()

    def release_late(self) -> None:
        """Deliver the messages held back by `Fault.late` to whoever is still there."""
        with self.lock:
            late, self._late = self._late, []
            for arrive in late:
                arrive()

    def _arrive(self, address: bytes, tag: int, payload: Buffer) -> None:
        link = self.links.get(address)
        if link is None or not link.arrive(tag, payload):
            self.dropped += 1


def _host(memory: Memory) -> Buffer:
    if isinstance(memory, DeviceBuffer):
        raise ValueError("the loopback transport moves host memory only")
    return memory


def _harm(payload: Buffer, fault: Fault) -> Buffer:
    payload = payload[: fault.truncate_to_bytes].copy()
    if fault.corrupt and payload.size:
        payload[payload.size // 2] ^= 0xFF
    return payload


@dataclass(order=True, slots=True)
class _Event:
    due_s: float
    number: int
    run: Callable[[], None] = field(compare=False)


class LoopbackTransport:
    name = "loopback"

    def __init__(self, network: LoopbackNetwork) -> None:
        self.network = network
        self._links: list[LoopbackLink] = []
        self._events: list[_Event] = []
        self._numbers = itertools.count()
        self._wake = threading.Condition()
        self._closing = False
        self._ended = False
        self._thread = threading.Thread(target=self._run, name="loopback-progress", daemon=True)
        self._thread.start()

    def open(self, handler: CompletionHandler, *, same_host: bool) -> LoopbackLink:
        with self.network.lock:
            if self._closing:
                raise LinkClosed("the transport is closed")
            link = LoopbackLink(self, handler, "loopback, same host" if same_host else "loopback, remote host")
            self._links.append(link)
            return link

    def close(self) -> None:
        with self.network.lock:
            self._closing = True
            links = tuple(self._links)
        for link in links:
            link.close()
        with self._wake:
            self._wake.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join(_DEADLINE_S)

    def forget(self, link: LoopbackLink) -> None:
        """With the network's lock held."""
        self._links.remove(link)

    def schedule(self, run: Callable[[], None], delay_s: float = 0.0) -> None:
        """Run it on the transport's thread, in the order of the due times."""
        with self._wake:
            heapq.heappush(self._events, _Event(time.monotonic() + delay_s, next(self._numbers), run))
            self._wake.notify()

    def flush(self) -> None:
        """Wait until everything scheduled without delay has run; at once on the transport's own thread."""
        if threading.current_thread() is self._thread:
            return
        done = threading.Event()
        with self._wake:
            if self._ended:
                return
            self.schedule(done.set)
        if not done.wait(_DEADLINE_S):
            raise TransferError(f"the loopback thread did not answer within {_DEADLINE_S} s")

    def _run(self) -> None:
        while (run := self._next()) is not None:
            run()

    def _next(self) -> Callable[[], None] | None:
        """The next event once it is due; None when closed and nothing is due."""
        with self._wake:
            while True:
                wait_s = self._events[0].due_s - time.monotonic() if self._events else None
                if wait_s is not None and wait_s <= 0:
                    return heapq.heappop(self._events).run
                if self._closing and not self._links:
                    self._ended = True
                    return None
                self._wake.wait(wait_s)


@dataclass(slots=True)
class _Receive:
    number: int
    tag: int
    into: Buffer


class LoopbackLink:
    """All fields are guarded by the network's lock."""

    def __init__(self, transport: LoopbackTransport, handler: CompletionHandler, description: str) -> None:
        self._transport = transport
        self._network = transport.network
        self._handler = handler
        self._description = description
        self._numbers = itertools.count(1)
        self._peer: bytes | None = None
        self._closed = False
        self._sends: set[int] = set()
        self._receives: dict[int, _Receive] = {}
        self._unexpected: deque[tuple[int, Buffer]] = deque()
        self.address = self._network.join(self)

    def connect(self, peer_address: bytes) -> None:
        with self._network.lock:
            if self._closed:
                raise LinkClosed("the link is closed")
            if self._peer is not None:
                raise TransferError("the link is connected already")
            if peer_address not in self._network.links:
                raise TransferError("nobody is at the peer address")
            self._peer = peer_address

    def send(self, tag: int, data: Memory) -> int:
        data = _host(data)
        check_operation(tag, data, writable=False)
        with self._network.lock:
            number = self._accept()
            if self._peer is None:
                raise TransferError("send before connect")
            self._sends.add(number)
            fault = self._network.fault_for(tag, data.size)
            self._transport.schedule(partial(self._transmit, number, tag, data, fault), fault.delay_s)
            return number

    def receive(self, tag: int, into: Memory) -> int:
        into = _host(into)
        check_operation(tag, into, writable=True)
        with self._network.lock:
            receive = _Receive(self._accept(), tag, into)
            self._receives[receive.number] = receive
            for index, (waiting_tag, payload) in enumerate(self._unexpected):
                if waiting_tag == tag:
                    del self._unexpected[index]
                    self._land(receive, payload)
                    break
            return receive.number

    def cancel(self, operation: int) -> None:
        with self._network.lock:
            if self._receives.pop(operation, None) is not None:
                self._complete(Completion(operation, Outcome.CANCELLED, 0))

    def describe(self) -> str:
        return self._description

    def close(self) -> None:
        with self._network.lock:
            if not self._closed:
                self._closed = True
                self._transport.forget(self)
                del self._network.links[self.address]
                for number in (*self._receives, *self._sends):
                    self._complete(Completion(number, Outcome.FAILED, 0, "the link was closed"))
                self._receives.clear()
                self._sends.clear()
                self._unexpected.clear()
        self._transport.flush()

    def arrive(self, tag: int, payload: Buffer) -> bool:
        """A message for this link, with the lock held; False if there is no room for it."""
        for receive in self._receives.values():
            if receive.tag == tag:
                self._land(receive, payload)
                return True
        if len(self._unexpected) >= MAX_UNEXPECTED:
            return False
        self._unexpected.append((tag, payload))
        return True

    def _accept(self) -> int:
        if self._closed:
            raise LinkClosed("the link is closed")
        if len(self._receives) + len(self._sends) >= MAX_OPEN_OPERATIONS:
            raise TransferError(f"more than {MAX_OPEN_OPERATIONS} operations are open on one link")
        return next(self._numbers)

    def _land(self, receive: _Receive, payload: Buffer) -> None:
        del self._receives[receive.number]
        if payload.size > receive.into.size:
            error = "the message is larger than the buffer"
            self._complete(Completion(receive.number, Outcome.TRUNCATED, 0, error))
            return
        receive.into[: payload.size] = payload
        self._complete(Completion(receive.number, Outcome.DONE, payload.size))

    def _transmit(self, number: int, tag: int, data: Buffer, fault: Fault) -> None:
        with self._network.lock:
            if number not in self._sends or self._peer is None:
                return  # the link was closed meanwhile, and the send has failed already
            self._sends.remove(number)
            self._network.carry(self._peer, tag, data, fault)
            if self._peer in self._network.links:
                self._complete(Completion(number, Outcome.DONE, data.size))
            else:
                self._complete(Completion(number, Outcome.FAILED, 0, "the peer is gone"))

    def _complete(self, completion: Completion) -> None:
        self._transport.schedule(partial(deliver, self._handler, completion))
