"""The fleet is what sessions say: addresses only add; a worker leaves when its session is dead and it is not listed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any

import grpc
import pytest

from kvstore.keys import block_keys, root_key
from pdserve.discovery import Endpoint
from pdserve.errors import Overloaded
from pdserve.protocol import worker_pb2 as pb
from router.bench.stub_worker import FINGERPRINT, Fabric, StubSession, StubSpec, StubWorker
from router.fleet import Fleet
from router.limits import FleetLimits, LinkLimits
from tests.support.faulty_worker import FaultyWorker
from tests.support.stub_cluster import DECODE, MIXED, PREFILL, until

LIMITS = FleetLimits(
    poll_s=0.02, forget_s=0.3, warmup_s=0.5, link=LinkLimits(ping_s=0.1, suspect_s=0.3, dead_s=0.6, backoff_max_s=0.2)
)


class Listed:
    """Discovery as a test wants it; None is a Redis that is down."""

    def __init__(self) -> None:
        self.addresses: list[str] | None = []

    async def poll(self) -> Sequence[Endpoint] | None:
        if self.addresses is None:
            return None
        return [Endpoint("test", "worker", address, address) for address in self.addresses]

    async def close(self) -> None:
        pass


class Heard:
    def __init__(self) -> None:
        self.messages: list[tuple[str, pb.WorkerMessage]] = []
        self.lost: list[str] = []

    def on_message(self, worker_id: str, message: pb.WorkerMessage) -> None:
        self.messages.append((worker_id, message))

    def on_worker_lost(self, worker_id: str, reason: str) -> None:
        self.lost.append(worker_id)


class Setting:
    def __init__(self) -> None:
        self.listed = Listed()
        self.heard = Heard()
        self.fleet = Fleet(self.listed, "test", LIMITS)
        self.workers: list[StubWorker] = []

    async def add(self, worker: StubWorker, state: str = "ready") -> StubWorker:
        self.workers.append(worker)
        address = await worker.start()
        assert self.listed.addresses is not None
        self.listed.addresses.append(address)
        await until(lambda: self.state(address) == state)
        return worker

    def state(self, address: str) -> str | None:
        found = [entry["state"] for entry in self.fleet.topology()["workers"] if entry["address"] == address]
        return found[0] if found else None


@pytest.fixture
async def setting() -> AsyncIterator[Setting]:
    setting = Setting()
    setting.fleet.start(setting.heard)
    yield setting
    await setting.fleet.close()
    for worker in setting.workers:
        await worker.stop()


def stub(name: str, role: pb.Role = MIXED, **changes: object) -> StubWorker:
    return StubWorker(replace(StubSpec(name, role), **changes), Fabric())  # type: ignore[arg-type]


async def test_nothing_is_known_before_the_first_worker(setting: Setting) -> None:
    assert not setting.fleet.ready
    with pytest.raises(Overloaded):
        setting.fleet.root_key(b"")
    await setting.add(stub("m0"))
    assert setting.fleet.ready
    assert setting.fleet.root_key(b"") == root_key(FINGERPRINT)


async def test_a_worker_that_is_not_listed_any_more_stays_while_its_session_lives(setting: Setting) -> None:
    worker = await setting.add(stub("m0"))
    setting.listed.addresses = []
    await asyncio.sleep(0.5)
    assert setting.fleet.member("m0") is not None
    await worker.stop()
    await until(lambda: not setting.fleet.topology()["workers"])
    assert setting.heard.lost == ["m0"]


async def test_without_redis_nobody_is_forgotten_and_a_restarted_worker_is_found_again(setting: Setting) -> None:
    worker = await setting.add(stub("m0"))
    setting.listed.addresses = None
    await worker.stop()
    await until(lambda: setting.state(worker.address) == "unreachable")
    await asyncio.sleep(0.5)
    await worker.start(worker.address)
    await until(lambda: setting.state(worker.address) == "ready")


async def test_while_nobody_is_ready_a_redis_that_does_not_answer_is_told(setting: Setting) -> None:
    setting.listed.addresses = None
    await until(lambda: setting.fleet.why_not_ready.startswith("no worker has joined; Redis"))
    setting.listed.addresses = []
    await until(lambda: setting.fleet.why_not_ready == "no worker has joined")
    await setting.add(stub("m0"))
    setting.listed.addresses = None
    await asyncio.sleep(0.1)
    assert setting.fleet.ready


async def test_a_drain_is_of_the_worker_whatever_its_port(setting: Setting) -> None:
    first = await setting.add(stub("m0"))
    await setting.add(stub("m1"))
    assert setting.fleet.drain("m0", True)
    await first.stop()
    await until(lambda: setting.fleet.member("m0") is None)
    second = await setting.add(stub("m0", incarnation=2), state="drained")
    assert second.address != first.address
    assert [each.worker_id for each in setting.fleet.in_use()] == ["m1"]
    assert setting.fleet.drain("m0", False)
    await until(lambda: setting.state(second.address) == "ready")


async def test_a_drain_is_undone_while_its_worker_is_away(setting: Setting) -> None:
    worker = await setting.add(stub("m0"))
    assert setting.fleet.drain("m0", True)
    assert setting.listed.addresses is not None
    setting.listed.addresses.clear()
    await worker.stop()
    await until(lambda: not setting.fleet.topology()["workers"])
    assert setting.fleet.drain("m0", False)
    assert not setting.fleet.drain("m0", False), "nobody knows it any more"
    assert not setting.fleet.drain("m0", True)
    await setting.add(stub("m0", incarnation=2))


async def test_drains_that_nobody_undoes_are_bounded() -> None:
    fleet = Fleet(Listed(), "test", replace(LIMITS, workers=1))
    listed = fleet._discovery
    assert isinstance(listed, Listed)
    fleet.start(Heard())
    assert listed.addresses is not None
    for name in ("m0", "m1"):
        worker = stub(name)
        listed.addresses.append(await worker.start())
        await until(lambda: len(fleet.known()) == 1)
        assert fleet.drain(name, True)
        listed.addresses.clear()
        await worker.stop()
        await until(lambda: not fleet.topology()["workers"])
    assert not fleet.drain("m0", False), "the oldest went"
    assert fleet.drain("m1", False)
    await fleet.close()


async def test_an_earlier_life_of_a_worker_is_not_shown_beside_it(setting: Setting) -> None:
    first = await setting.add(stub("m0"))
    assert setting.listed.addresses is not None
    await first.stop()
    await until(lambda: setting.state(first.address) == "unreachable")
    second = await setting.add(stub("m0", incarnation=2))
    assert [each.link.address for each in setting.fleet.known()] == [second.address]


async def test_a_silent_worker_is_first_suspect_and_then_dead(setting: Setting) -> None:
    worker = FaultyWorker(StubSpec("m0", MIXED), Fabric())
    await setting.add(worker)
    states: list[str | None] = []
    worker.frozen = True
    while not setting.heard.lost:
        states.append(setting.state(worker.address))
        await asyncio.sleep(0.01)
    assert "suspect" in states
    worker.frozen = False
    worker.thawed.set()
    await until(lambda: setting.state(worker.address) == "ready")


async def test_a_worker_that_differs_from_the_fleet_is_refused_in_clear_text(setting: Setting) -> None:
    await setting.add(stub("m0"))
    other = await setting.add(stub("m1", fingerprint=b"other"), state="incompatible")
    assert setting.fleet.member("m1") is None
    [entry] = [e for e in setting.fleet.topology()["workers"] if e["address"] == other.address]
    assert (
        entry["error"]
        == f"layout fingerprint (of weights, dtypes and layout) is {b'other'.hex()}, the fleet has {FINGERPRINT.hex()}"
    )
    await setting.add(stub("m0"), state="incompatible")  # the same id twice
    assert setting.fleet.counts() == {("mixed", "ready"): 1, ("mixed", "incompatible"): 2}


async def test_a_fleet_that_was_replaced_entirely_takes_the_new_fingerprint(setting: Setting) -> None:
    worker = await setting.add(stub("m0"))
    await worker.stop()
    await until(lambda: setting.fleet.member("m0") is None)
    await setting.add(stub("m1", fingerprint=b"new"))
    assert setting.fleet.root_key(b"") == root_key(b"new")


async def test_prefill_workers_are_told_their_decode_peers_and_count_open_links(setting: Setting) -> None:
    await setting.add(stub("p0", PREFILL))
    assert setting.fleet.why_not_ready.startswith("waiting for a decode worker")
    await setting.add(stub("d0", DECODE))
    prefill = setting.fleet.member("p0")
    assert prefill is not None
    await until(lambda: prefill.partners == 1)
    decode = await setting.add(stub("d1", DECODE))
    await until(lambda: prefill.partners == 2)
    await decode.stop()
    await until(lambda: prefill.partners == 1)
    [entry] = [e for e in setting.fleet.topology()["workers"] if e["worker_id"] == "p0"]
    assert {"to": "d0", "up": True, "transport": "stub", "bytes_per_second": 0.0, "error": ""} in entry["links"]


async def test_prefill_and_decode_are_ready_with_their_link_or_after_a_while_without(setting: Setting) -> None:
    class Unlinked(StubWorker):
        async def next_message(self, session: StubSession) -> pb.WorkerMessage:
            while (message := await super().next_message(session)).HasField("link"):
                pass
            return message

    await setting.add(stub("d0", DECODE))
    await setting.add(Unlinked(StubSpec("p0", PREFILL), Fabric()))
    assert not setting.fleet.ready
    await until(lambda: setting.fleet.ready)


async def test_the_index_follows_kv_events_and_a_gap_brings_a_new_snapshot(setting: Setting) -> None:
    worker = await setting.add(stub("m0"))
    keys = block_keys(root_key(b"x"), range(64), 16)
    index = setting.fleet.index
    [session] = worker.sessions
    session.send_events(keys[:2])
    await until(lambda: len(index) == 2)
    worker._held.update(dict.fromkeys(keys))
    session.next_event += 1  # one was lost
    session.send_events(keys[2:3])
    await until(lambda: setting.heard.lost == ["m0"])
    await until(lambda: len(index) == 4)
    assert list(index.match(keys).by_slot().values()) == [4]
    await worker.stop()
    await until(lambda: len(index) == 0)


@pytest.mark.parametrize(
    "body",
    [
        {"kv_events": pb.KvEvents(sequence=1, stored=b"odd")},
        {"kv_events": pb.KvEvents(sequence=1, stored=bytes(16 * 10))},
        {"hello": pb.WorkerHello()},
        {},
    ],
)
async def test_a_message_that_no_worker_may_send_ends_the_session(setting: Setting, body: dict[str, object]) -> None:
    worker = await setting.add(stub("m0", num_blocks=4))
    [session] = worker.sessions
    session.send(**body)
    await until(lambda: setting.heard.lost == ["m0"])
    await until(lambda: setting.state(worker.address) == "ready")


async def test_an_address_where_no_worker_answers_is_dialled_and_reported(setting: Setting) -> None:
    assert setting.listed.addresses is not None
    setting.listed.addresses.append("127.0.0.1:1")
    await until(lambda: "UNAVAILABLE" in str(setting.fleet.topology()["workers"]))
    assert setting.fleet.counts() == {("unknown", "unreachable"): 1}


@pytest.mark.parametrize("before_hello", [True, False])
async def test_a_session_that_the_worker_cancels_is_dialled_again(setting: Setting, before_hello: bool) -> None:
    class Cancelling(StubWorker):
        calls = 0

        async def Session(
            self, request_iterator: AsyncIterator[pb.RouterMessage], context: Any
        ) -> AsyncIterator[pb.WorkerMessage]:
            self.calls += 1
            if self.calls == 1:
                if not before_hello:
                    yield pb.WorkerMessage(hello=self._hello())
                await context.abort(grpc.StatusCode.CANCELLED, "not now")
            async for message in super().Session(request_iterator, context):
                yield message

    worker = Cancelling(StubSpec("m0", MIXED), Fabric())
    await setting.add(worker)
    await until(lambda: worker.calls >= 2 and setting.state(worker.address) == "ready")
