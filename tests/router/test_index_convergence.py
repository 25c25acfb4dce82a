"""Whatever happens to KV events on their way, lost, doubled, out of order, the index ends up with the truth."""

from __future__ import annotations

from collections import deque

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvstore.control_plane import IN_THE_CLEAR
from kvstore.keys import BlockKey
from pdserve.discovery import StaticDiscovery
from pdserve.protocol import PROTOCOL_VERSION
from pdserve.protocol import worker_pb2 as pb
from router.fleet import Fleet
from router.limits import FleetLimits
from router.link import WorkerLink
from router.member import Member

KEYS = [BlockKey(bytes([number]) * 16) for number in range(24)]
some_keys = st.lists(st.sampled_from(KEYS), min_size=1, max_size=6, unique=True)


class Worker:
    """The truth, and the events of its present session that are under way."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.incarnation = 1
        self.held: set[BlockKey] = set()
        self.under_way: deque[pb.KvEvents] = deque()
        self.sequence = 0

    def hello(self) -> pb.WorkerHello:
        sizes = {"block_size": 16, "num_blocks": len(KEYS), "max_model_len": 1024, "max_sequences": 8, "vocab_size": 99}
        return pb.WorkerHello(
            protocol_version=PROTOCOL_VERSION,
            worker_id=self.name,
            incarnation=self.incarnation,
            role=pb.MIXED,
            **sizes,
        )

    def begin_session(self) -> None:
        self.under_way.clear()
        self.sequence = 0
        self.emit(stored=sorted(self.held), snapshot=True)

    def emit(self, stored: list[BlockKey] = [], removed: list[BlockKey] = [], snapshot: bool = False) -> None:  # noqa: B006
        event = pb.KvEvents(
            sequence=self.sequence, snapshot=snapshot, stored=b"".join(stored), removed=b"".join(removed)
        )
        self.under_way.append(event)
        self.sequence += 1


class LossyEvents(RuleBasedStateMachine):
    """Sessions end as a link ends them: when a message raises, and when the worker dies."""

    def __init__(self) -> None:
        super().__init__()
        self.fleet = Fleet(StaticDiscovery(()), "test", FleetLimits())
        self.workers: dict[WorkerLink, Worker] = {}
        for slot, name in enumerate("ab"):
            link = WorkerLink(name, "test", self.fleet, FleetLimits().link, IN_THE_CLEAR)
            self.fleet._by_link[link] = self.fleet._members[name] = Member(slot, self.fleet.columns, link, 0.0)
            self.workers[link] = Worker(name)
            self.begin_session(link)

    def begin_session(self, link: WorkerLink) -> None:
        self.workers[link].begin_session()
        self.fleet.link_up(link, self.workers[link].hello())

    def pick(self, first: bool) -> tuple[WorkerLink, Worker]:
        return list(self.workers.items())[0 if first else 1]

    def deliver(self, link: WorkerLink, event: pb.KvEvents) -> None:
        try:
            self.fleet.link_message(link, pb.WorkerMessage(kv_events=event))
        except ValueError as error:
            self.fleet.link_down(link, str(error))
            self.begin_session(link)

    @rule(first=st.booleans(), keys=some_keys)
    def store(self, first: bool, keys: list[BlockKey]) -> None:
        _, worker = self.pick(first)
        worker.held.update(keys)
        worker.emit(stored=keys)

    @rule(first=st.booleans(), keys=some_keys)
    def evict(self, first: bool, keys: list[BlockKey]) -> None:
        _, worker = self.pick(first)
        worker.held.difference_update(keys)
        worker.emit(removed=keys)

    @rule(first=st.booleans(), count=st.integers(1, 4))
    def arrive(self, first: bool, count: int) -> None:
        link, worker = self.pick(first)
        for _ in range(count):
            if worker.under_way:
                self.deliver(link, worker.under_way.popleft())

    @rule(first=st.booleans(), at=st.integers(0, 5))
    def lose(self, first: bool, at: int) -> None:
        """Only if a later one is under way: that it is missing shows with that, and not with one told twice."""
        _, worker = self.pick(first)
        events = worker.under_way
        if at < len(events) and any(each.sequence > events[at].sequence for each in events):
            del events[at]

    @rule(first=st.booleans(), at=st.integers(0, 5))
    def double(self, first: bool, at: int) -> None:
        _, worker = self.pick(first)
        if at < len(worker.under_way):
            worker.under_way.append(worker.under_way[at])

    @rule(first=st.booleans(), at=st.integers(0, 5))
    def overtake(self, first: bool, at: int) -> None:
        _, worker = self.pick(first)
        if at + 1 < len(worker.under_way):
            events = worker.under_way
            events[at], events[at + 1] = events[at + 1], events[at]

    @rule(first=st.booleans())
    def restart(self, first: bool) -> None:
        """Another life, with an empty pool; what is still under way belongs to the old one and must not count."""
        link, worker = self.pick(first)
        late = list(worker.under_way)
        self.fleet.link_down(link, "killed")
        for event in late:
            self.fleet.link_message(link, pb.WorkerMessage(kv_events=event))
        assert self.fleet.index.count(0 if first else 1) == 0
        worker.incarnation += 1
        worker.held.clear()
        self.begin_session(link)

    @rule(first=st.booleans(), keys=some_keys, now_s=st.floats(0.0, 50.0))
    def route_there(self, first: bool, keys: list[BlockKey], now_s: float) -> None:
        self.fleet.index.expect(0 if first else 1, keys, now_s, now_s + 10.0)

    @precondition(lambda self: all(not worker.under_way for worker in self.workers.values()))
    @invariant()
    def converged(self) -> None:
        """Once everything arrived, and what was expected in vain was forgotten."""
        index = self.fleet.index
        index.expire(1e9)
        for slot, worker in enumerate(self.workers.values()):
            assert index.count_expected(slot) == 0
            assert {key for key in KEYS if index.match([key]).of(slot)} == worker.held
            assert index.count(slot) == len(worker.held)

    def teardown(self) -> None:
        for link, worker in self.workers.items():
            while worker.under_way:
                self.deliver(link, worker.under_way.popleft())
        self.converged()


LossyEvents.TestCase.settings = settings(max_examples=80, stateful_step_count=40)
TestLossyEvents = LossyEvents.TestCase
