"""The queue: every request leaves exactly once, nobody starves, tenants share, and it is bounded."""

from __future__ import annotations

from collections import Counter

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from router.queue import LATE_TURNS, Queued, RequestQueue, ahead_of

CLASSES = {"interactive": 1.0, "standard": 4.0, "batch": 120.0}
PLACES = 20


def queued(slo_class: str = "standard", at_s: float = 0.0, tenant: str = "t", work_s: float = 0.1) -> Queued:
    return Queued(tenant, slo_class, at_s, due_s=at_s + CLASSES[slo_class] - work_s, work_s=work_s)


def turns(queue: RequestQueue[Queued], now_s: float, count: int) -> list[Queued]:
    taken = []
    for _ in range(count):
        item = queue.order(now_s)[0]
        queue.take(item, now_s)
        taken.append(item)
    return taken


def test_the_one_with_the_least_slack_goes_first() -> None:
    queue: RequestQueue[Queued] = RequestQueue(PLACES)
    batch, standard, interactive = queued("batch"), queued("standard", 0.1), queued("interactive", 0.2)
    for item in (batch, standard, interactive):
        queue.add(item)
    assert ahead_of(standard, queue.order(0.3)) == [interactive]
    assert turns(queue, 0.3, 3) == [interactive, standard, batch]


def test_priority_is_seconds_of_slack() -> None:
    queue: RequestQueue[Queued] = RequestQueue(PLACES)
    plain, later, sooner = queued(at_s=0.0), queued(at_s=0.0), queued(at_s=0.5)
    later.priority_s, sooner.priority_s = 1, -1
    for item in (later, plain, sooner):
        queue.add(item)
    assert turns(queue, 0.6, 3) == [sooner, plain, later]


def test_batch_that_has_waited_long_is_not_overtaken_any_more() -> None:
    queue: RequestQueue[Queued] = RequestQueue(PLACES)
    batch = queued("batch", 0.0)
    queue.add(batch)
    queue.add(queued("interactive", 119.5))
    assert queue.order(119.6)[0] is batch


def test_what_is_late_goes_behind_what_can_still_be_good_but_has_some_turns() -> None:
    queue: RequestQueue[Queued] = RequestQueue(10 * PLACES)
    late = [queued("interactive", at_s) for at_s in (0.1, 0.0, 0.2)]
    for item in late:
        queue.add(item)
    for _ in range(2 * LATE_TURNS):
        queue.add(queued("standard", 10.0))
    taken = turns(queue, 11.0, 2 * LATE_TURNS)
    assert [at for at, item in enumerate(taken) if item in late] == [LATE_TURNS - 1, 2 * LATE_TURNS - 1]
    assert [item.queued_s for item in taken if item in late] == [0.0, 0.1]  # the oldest first


def test_a_tenant_with_few_requests_is_not_held_up_by_one_with_many() -> None:
    queue: RequestQueue[Queued] = RequestQueue(1000)
    for _ in range(100):
        queue.add(queued(tenant="many", work_s=1.0))
    for _ in range(5):
        queue.add(queued(at_s=0.5, tenant="few", work_s=1.0))
    first = [item.tenant for item in turns(queue, 1.0, 12)]
    assert first.count("few") == 5
    assert first[0] == "many"  # it was due before, and nobody had been given anything


def test_tenants_share_by_work_not_by_requests() -> None:
    queue: RequestQueue[Queued] = RequestQueue(1000)
    for _ in range(60):
        queue.add(queued(tenant="large", work_s=2.0))
        queue.add(queued(tenant="small", work_s=0.5))
    work = Counter[str]()
    for item in turns(queue, 0.0, 50):
        work[item.tenant] += int(item.work_s * 10)
    assert work["large"] == pytest.approx(work["small"], rel=0.2)


def test_a_tenant_gets_no_credit_for_the_time_it_was_away() -> None:
    queue: RequestQueue[Queued] = RequestQueue(1000)
    queue.add(queued(tenant="away"))
    for _ in range(50):
        queue.add(queued(tenant="busy", work_s=1.0))
    turns(queue, 0.0, 40)
    for _ in range(20):
        queue.add(queued(tenant="away", work_s=1.0))
    assert [item.tenant for item in turns(queue, 0.0, 10)].count("busy") >= 4


@pytest.mark.parametrize("held_up", [False, True])
def test_tenants_without_end_are_forgotten_but_for_those_that_wait(held_up: bool) -> None:
    """Credentials that nobody checks name a tenant: any client may bring a new one each time."""
    queue: RequestQueue[Queued] = RequestQueue(PLACES)
    if held_up:
        queue.add(queued("batch", tenant="waits", work_s=0.0))
    for n in range(10 * PLACES):
        item = queued("interactive", tenant=f"t{n}", work_s=0.0)
        queue.add(item)
        assert queue.order(0.1)[0] is item
        queue.take(item, 0.1)
        assert len(queue._served_s) <= 2 * PLACES + 1
    assert len(queue) == held_up


def test_one_tenant_leaves_room_for_others() -> None:
    queue: RequestQueue[Queued] = RequestQueue(PLACES)
    while queue.refuses("many") is None:
        queue.add(queued(tenant="many"))
    assert queue.refuses("many") == "tenant_share"
    assert len(queue) == PLACES * 4 // 5
    assert queue.refuses("other") is None
    number = 0
    while queue.refuses(f"other{number}") is None:
        queue.add(queued(tenant=f"other{number}"))
        number += 1
    assert queue.refuses("new") == "queue_full"
    assert len(queue) == PLACES


@settings(max_examples=20)
@given(
    st.lists(st.tuples(st.sampled_from(sorted(CLASSES)), st.sampled_from("abc"), st.floats(0.01, 3.0)), max_size=15),
    st.lists(st.sampled_from("abcdefgh"), min_size=300, max_size=300),
)
def test_nobody_starves_however_many_urgent_ones_keep_coming(
    first: list[tuple[str, str, float]], newcomers: list[str]
) -> None:
    """More comes than is served, all of it urgent, from tenants that had nothing yet."""
    queue: RequestQueue[Queued] = RequestQueue(10_000)
    waiting = [queued(slo_class, tenant=tenant, work_s=work_s) for slo_class, tenant, work_s in first]
    for item in waiting:
        queue.add(item)
    now_s = 0.0
    for tenant in newcomers:
        now_s += 1.0
        for _ in range(2):
            queue.add(queued("interactive", now_s, tenant=f"{tenant}{now_s}", work_s=0.01))
        [taken] = turns(queue, now_s, 1)
        waiting = [item for item in waiting if item is not taken]
    assert not waiting


class QueueMachine(RuleBasedStateMachine):
    """Arrivals, turns and clients that leave, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.queue: RequestQueue[Queued] = RequestQueue(PLACES)
        self.now_s = 0.0
        self.waiting: list[Queued] = []
        self.left: list[Queued] = []

    @rule(
        slo_class=st.sampled_from(sorted(CLASSES)),
        tenant=st.sampled_from("abc"),
        work_s=st.floats(0.0, 5.0),
        priority=st.integers(-3, 3),
    )
    def arrive(self, slo_class: str, tenant: str, work_s: float, priority: int) -> None:
        if self.queue.refuses(tenant) is None:
            item = queued(slo_class, self.now_s, tenant, work_s)
            item.priority_s = priority
            self.queue.add(item)
            self.waiting.append(item)

    @rule(seconds=st.floats(0.0, 30.0))
    def wait(self, seconds: float) -> None:
        self.now_s += seconds

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def turn(self, data: st.DataObject) -> None:
        """The first whose worker is free: any of them."""
        item = data.draw(st.sampled_from(self.queue.order(self.now_s)))
        self.queue.take(item, self.now_s)
        self._gone(item)

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        item = data.draw(st.sampled_from(self.waiting))
        self.queue.remove(item)
        self._gone(item)

    @precondition(lambda self: self.left)
    @rule(data=st.data())
    def remove_again(self, data: st.DataObject) -> None:
        self.queue.remove(data.draw(st.sampled_from(self.left)))

    def _gone(self, item: Queued) -> None:
        self.waiting.remove(item)
        self.left.append(item)

    @invariant()
    def every_request_is_in_it_once_until_it_leaves(self) -> None:
        order = self.queue.order(self.now_s)
        assert len(order) == len(self.queue) == len(self.waiting) <= PLACES
        assert set(map(id, order)) == set(map(id, self.waiting))
        assert self.queue.depths() == Counter(item.slo_class for item in self.waiting)
        assert set(self.queue._by_tenant) == {item.tenant for item in self.waiting}

    @invariant()
    def it_is_sorted_by_lateness_slack_and_what_tenants_were_given(self) -> None:
        late, due = [], []
        for item in self.queue.order(self.now_s):
            is_late = item.due_s < self.now_s
            rank_s = (item.queued_s if is_late else item.due_s) + item.priority_s + self.queue._served_s[item.tenant]
            (late if is_late else due).append(rank_s)
            assert not (late and not is_late) or len(late) == 1  # one late one may have its turn first
        assert due == sorted(due)
        assert late == sorted(late)

    @invariant()
    def of_one_tenant_the_due_ones_are_in_order_of_their_slack(self) -> None:
        due = [item for item in self.queue.order(self.now_s) if item.due_s >= self.now_s]
        for tenant in "abc":
            slacks = [item.due_s + item.priority_s for item in due if item.tenant == tenant]
            assert slacks == sorted(slacks)


TestQueueMachine = QueueMachine.TestCase
