"""What NIXL links tell each other, which message meets which receive, and that NIXL's absence is one sentence."""

from __future__ import annotations

import contextlib
import sys
from collections import defaultdict, deque

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.errors import TransferError, Unavailable
from kvstore.transfer.matching import MAX_UNEXPECTED_BYTES, Matching, Receive
from kvstore.transfer.nixl import NixlTransport
from kvstore.transfer.nixl_agent import Place
from kvstore.transfer.nixl_records import Alive, Inline, Message, Offer, Record, Taken, decode
from kvstore.transfer.transport import DeviceBuffer
from tests.support.transports import OWN_RUN, make_transport

NUMBERS = st.integers(0, 2**64 - 1)
OFFERS = st.builds(Offer, NUMBERS, NUMBERS, NUMBERS, NUMBERS, st.integers(0, 2**32 - 1), st.booleans())
RECORDS = st.one_of(
    OFFERS, st.builds(Inline, NUMBERS, NUMBERS, st.binary()), st.builds(Taken, NUMBERS, st.booleans()), st.just(Alive())
)


@given(st.lists(RECORDS))
def test_a_run_of_records_is_read_back(records: list[Record]) -> None:
    assert list(decode(b"".join(record.encode() for record in records))) == records


@given(RECORDS, st.data())
def test_a_record_cut_short_is_refused(record: Record, data: st.DataObject) -> None:
    encoded = record.encode()
    if len(encoded) > 1:
        with pytest.raises(TransferError):
            list(decode(encoded[: data.draw(st.integers(1, len(encoded) - 1))]))


def test_a_record_of_another_version_is_refused() -> None:
    with pytest.raises(TransferError, match="kind 9"):
        list(decode(bytes((9, 0, 0))))


TAGS = st.integers(0, 2)
EVENTS = st.one_of(st.tuples(st.just("post"), TAGS), st.tuples(st.just("arrive"), TAGS), st.just(("cancel", 0)))


@given(st.lists(EVENTS))
def test_each_message_meets_the_oldest_receive_of_its_tag(events: list[tuple[str, int]]) -> None:
    matching: Matching[Inline] = Matching()
    waiting: dict[int, deque[int]] = defaultdict(deque)
    early: dict[int, deque[Inline]] = defaultdict(deque)
    into = np.zeros(8, np.uint8)
    for number, (what, tag) in enumerate(events):
        if what == "post":
            message = matching.post(Receive(number, tag, into))
            assert message == (early[tag].popleft() if early[tag] else None)
            if message is None:
                waiting[tag].append(number)
        elif what == "arrive":
            receive = matching.arrive(sent := Inline(number, tag, b""))
            assert (receive.number if receive else None) == (waiting[tag].popleft() if waiting[tag] else None)
            if receive is None:
                early[tag].append(sent)
        else:
            known = [numbers for numbers in waiting.values() if numbers]
            assert not matching.cancel(number)
            if known:
                assert matching.cancel(known[0].pop())
        assert set(matching.receives()) == {number for numbers in waiting.values() for number in numbers}
        assert matching.num_receives == len(list(matching.receives()))


def test_what_nobody_asked_for_has_an_end() -> None:
    matching: Matching[Message] = Matching()
    data = bytes(MAX_UNEXPECTED_BYTES // 4)
    for number in range(4):
        matching.arrive(Inline(number, number, data))
    with pytest.raises(TransferError, match="without end"):
        matching.arrive(Inline(4, 4, b"x"))


def test_a_place_is_held_by_what_spans_it_on_the_same_device() -> None:
    pool = DeviceBuffer(4096, 1024, None, device=1)
    assert Place.of(pool).holds(Place.of(DeviceBuffer(4096 + 512, 512, None, device=1)))
    assert not Place.of(pool).holds(Place.of(DeviceBuffer(4096 + 512, 513, None, device=1)))
    assert not Place.of(pool).holds(Place.of(DeviceBuffer(4096, 512, None, device=0)))
    assert not Place.of(pool).holds(Place(4096, 512, 1, is_device=False))
    host = np.zeros(64, np.uint8)
    assert Place.of(host).holds(Place.of(host[8:]))


def test_absent_nixl_gives_one_clear_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("nixl_cu12", "nixl_cu13"):
        monkeypatch.setitem(sys.modules, name, None)
        monkeypatch.setitem(sys.modules, f"{name}._bindings", None)
    with pytest.raises(Unavailable, match="needs the package nixl-cu12"):
        NixlTransport()


@pytest.mark.skipif(not OWN_RUN, reason="has a run of its own")
def test_a_peer_of_another_machine_is_refused_in_one_sentence() -> None:
    made = make_transport("nixl", np.zeros(64, np.uint8))
    with contextlib.closing(made), pytest.raises(TransferError, match="--transport ucx"):
        made.open(lambda completion: None, same_host=False)
