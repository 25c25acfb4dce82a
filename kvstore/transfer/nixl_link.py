"""One NIXL link: its agent, the messages it has offered, and those that it reads.

    send ── in registered memory ──> OFFER ──> peer reads ──> TAKEN: DONE      small, or elsewhere: INLINE: DONE at once
    receive ── its OFFER is here ──> read ──> DONE, and TAKEN to the peer

Only our own agent writes our memory, and it is destroyed before a link is LOST or CLOSED. Both ends say now and then
that they are there: NIXL itself does not notice a dead or a frozen peer.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from kvstore.errors import TransferError
from kvstore.transfer.matching import Matching, Receive
from kvstore.transfer.nixl_agent import NixlAgent, Place
from kvstore.transfer.nixl_records import Alive, Inline, Message, Offer, Record, Taken, decode
from kvstore.transfer.progress import ProgressThread
from kvstore.transfer.threaded_link import LinkState, ThreadedLink, wrap_address
from kvstore.transfer.transport import Completion, CompletionHandler, DeviceBuffer, Memory, Outcome

_READ_AT_ONCE = 32  # messages in one read: each has its completion when all are there
_MAX_READS = 2  # under way
_MAX_NOTIFICATION_BYTES = 1 << 20  # of records, and the one that crosses it
_INLINE_BYTES = 8192  # of host memory, and fewer, are sooner sent than offered
_ALIVE_EVERY_S = 1.0
_SILENT_S = 6.0  # a peer that has spoken, and then says nothing for so long, is gone


class LinkHost(Protocol):
    """What a link needs of its transport."""

    progress: ProgressThread
    library: Any  # NIXL's bindings
    places: Sequence[Place]  # what is registered
    settle: Callable[[], None]  # waits for copies that this process has queued on its GPU

    def retire(self, link: NixlLink) -> None: ...


@dataclass(slots=True)
class _Read:
    handle: int
    pairs: list[tuple[Receive, Offer]]
    borrowed: list[Any]  # registered for this read alone


class NixlLink(ThreadedLink):
    magic = b"PDN1"

    def __init__(self, host: LinkHost, handler: CompletionHandler) -> None:
        """On the progress thread. Raises TransferError."""
        super().__init__(host.progress, handler)
        self._host = host
        self._agent = NixlAgent(host.library, f"pdserve-{secrets.token_hex(16)}", host.places)
        self._peer: str | None = None
        self._matching: Matching[Message] = Matching()
        self._sends: dict[int, Memory] = {}  # offered, and not taken
        self._wanted: list[tuple[Receive, Offer]] = []  # to be read
        self._reads: list[_Read] = []
        self._said: list[bytes] = []  # records to be sent with the next notification
        self._spoke_s = 0.0
        self._heard_s: float | None = None
        self.address = wrap_address(self.magic, self._agent.metadata())

    def describe(self) -> str:
        how = "nixl, read over ucx"
        return how if self._state in (LinkState.OPEN, LinkState.CONNECTED) else f"{how} ({self._state.value})"

    @property
    def busy(self) -> bool:
        """Something may happen any moment."""
        return bool(self._sends or self._reads or self._wanted or self._matching.num_receives)

    def send(self, tag: int, data: Memory) -> int:
        self._check_reachable(data)
        return super().send(tag, data)

    def receive(self, tag: int, into: Memory) -> int:
        self._check_reachable(into)
        return super().receive(tag, into)

    def _check_reachable(self, memory: Memory) -> None:
        if isinstance(memory, DeviceBuffer) and not self._registered(Place.of(memory)):
            raise ValueError("memory of a device must be registered with the transport")

    def _registered(self, place: Place) -> bool:
        return any(known.holds(place) for known in self._host.places)

    # --- progress thread ---

    def advance(self) -> bool:
        try:
            return self._advance()
        except TransferError as error:
            self.take_down(LinkState.LOST, str(error))
            return True

    def _advance(self) -> bool:
        if self._state not in (LinkState.OPEN, LinkState.CONNECTED):
            return False
        notifications = self._agent.notifications()
        now_s = time.monotonic()
        if notifications:
            self._heard_s = now_s
        elif self._heard_s is not None and now_s > self._heard_s + _SILENT_S:
            raise TransferError("the peer is gone")
        for notification in notifications:
            for record in decode(notification):
                if not self._agent.closed:  # by a handler
                    self._heard(record)
        ended = self._end_reads()
        if self._agent.closed:  # by a handler
            return True
        self._begin_read()
        spoke = self._speak(now_s)
        return bool(notifications or ended or spoke or self._wanted)

    def _end_reads(self) -> bool:
        """Whether one has ended."""
        ended = [read for read in self._reads if self._agent.has_read(read.handle)]
        done: list[Completion] = []
        try:
            for read in ended:
                self._reads.remove(read)
                for receive, offer in read.pairs:
                    done.append(Completion(receive.number, Outcome.DONE, offer.size))
                    self._said.append(Taken(offer.operation, whole=True).encode())
                self._agent.forget(read.handle)
                for registered in read.borrowed:
                    self._agent.deregister(registered)
        finally:
            self._deliver(done)
        return bool(ended)

    def _heard(self, record: Record) -> None:
        match record:
            case Offer() | Inline():
                receive = self._matching.arrive(record)
                if receive is not None:
                    self._land(receive, record)
            case Taken(operation, whole):
                data = self._sends.pop(operation, None)
                if data is not None:
                    self._deliver([Completion(operation, Outcome.DONE, data.nbytes if whole else 0)])
            case Alive():
                pass

    def _land(self, receive: Receive, message: Message) -> None:
        if message.size > receive.into.nbytes:
            if isinstance(message, Offer):
                self._said.append(Taken(message.operation, whole=False).encode())
            error = "the message is larger than the buffer"
            self._deliver([Completion(receive.number, Outcome.TRUNCATED, 0, error)])
        elif isinstance(message, Offer):
            self._wanted.append((receive, message))
        elif isinstance(receive.into, DeviceBuffer):
            raise TransferError("a message for a device came from memory that its sender has not registered")
        else:
            receive.into[: message.size] = np.frombuffer(message.data, np.uint8)
            self._deliver([Completion(receive.number, Outcome.DONE, message.size)])

    def _begin_read(self) -> None:
        """One a round: within a host the bytes move in this very call, and other links wait. A read is of one kind of
        memory at either end."""
        if not self._wanted or self._peer is None or len(self._reads) >= _MAX_READS:
            return
        first = _kinds(*self._wanted[0])
        count = 1
        while count < min(len(self._wanted), _READ_AT_ONCE) and _kinds(*self._wanted[count]) == first:
            count += 1
        run, self._wanted = self._wanted[:count], self._wanted[count:]
        # At once among the reads: if it cannot begin its receives must end with the others'.
        self._reads.append(read := _Read(0, run, []))
        pairs = []
        for receive, offer in run:
            into = Place.of(receive.into)
            if not self._registered(into):
                read.borrowed.append(self._agent.register(into))
            mine = Place(into.address, offer.size, into.device, into.is_device)
            pairs.append((mine, Place(offer.address, offer.size, offer.device, offer.is_device)))
        read.handle = self._agent.read(self._peer, pairs)

    def _speak(self, now_s: float) -> bool:
        if self._peer is None:
            return False
        if not self._said:
            if now_s - self._spoke_s < _ALIVE_EVERY_S:
                return False
            self._said.append(Alive().encode())
        said, self._said, self._spoke_s = self._said, [], now_s
        notification = b""
        for record in said:
            notification += record
            if len(notification) >= _MAX_NOTIFICATION_BYTES:
                self._agent.notify(self._peer, notification)
                notification = b""
        if notification:
            self._agent.notify(self._peer, notification)
        return True

    def _connect(self, metadata: bytes) -> None:
        self._peer = self._agent.connect(metadata)

    def _post_send(self, number: int, tag: int, data: Memory) -> None:
        if self._state is not LinkState.CONNECTED:
            self._refuse(number, f"the link is {self._state.value}")
            return
        place = Place.of(data)
        small = not place.is_device and place.size <= _INLINE_BYTES
        if self._registered(place) and not small:
            self._sends[number] = data
            offer = Offer(number, tag, place.address, place.size, place.device, place.is_device)
            self._said.append(offer.encode())
        else:
            assert not isinstance(data, DeviceBuffer)
            self._said.append(Inline(number, tag, data.tobytes()).encode())
            self._deliver([Completion(number, Outcome.DONE, data.nbytes)])

    def _post_receive(self, number: int, tag: int, into: Memory) -> None:
        if self._state not in (LinkState.OPEN, LinkState.CONNECTED):
            self._refuse(number, f"the link is {self._state.value}")
            return
        receive = Receive(number, tag, into)
        message = self._matching.post(receive)
        if message is not None:
            try:
                self._land(receive, message)
            except TransferError as error:
                self._refuse(number, str(error))
                self.take_down(LinkState.LOST, str(error))

    def _cancel(self, number: int) -> None:
        if self._matching.cancel(number):
            self._deliver([Completion(number, Outcome.CANCELLED, 0)])

    def _end(self, reason: str) -> list[Completion]:
        """Destroys the agent."""
        self._host.retire(self)
        self._agent.close()
        self._host.settle()
        numbers = [*self._matching.receives(), *self._sends]
        numbers += [receive.number for receive, _ in self._wanted]
        numbers += [receive.number for read in self._reads for receive, _ in read.pairs]
        self._matching, self._sends, self._wanted, self._reads = Matching(), {}, [], []
        return [Completion(number, Outcome.FAILED, 0, reason) for number in numbers]


def _kinds(receive: Receive, offer: Offer) -> tuple[bool, bool]:
    return isinstance(receive.into, DeviceBuffer), offer.is_device
