"""A prefix is copied before its holders are full, within the budget, once until it is seen; memory is bounded."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.keys import GROUP_BLOCKS, BlockKey, block_keys
from pdserve.protocol import worker_pb2 as pb
from pdserve.request import SamplingParams
from router import hot_prefixes
from router.bench.stub_worker import Fabric, StubSpec, StubWorker
from router.explain import Explainer
from router.hot_prefixes import AGAIN_S, ALARM, PREFIXES, HotPrefixes, Target
from router.store_watch import StoreLife
from tests.support.stub_cluster import DECODE, MIXED, PREFILL, StubCluster, assert_exact, until, with_limits

BLOCK_BYTES = 1000
HOT = [BlockKey(bytes([n]) * 16) for n in range(3 * GROUP_BLOCKS)]


def chain(salt: int) -> list[BlockKey]:
    """Begins with the hot prefix, and goes on by itself for two groups."""
    return [*HOT, *(BlockKey(salt.to_bytes(8, "big") + n.to_bytes(8, "big")) for n in range(2 * GROUP_BLOCKS))]


def targets(*busy_s: float, reach: int = 1 << 20) -> list[Target]:
    return [Target(f"w{slot}", slot, reach, each) for slot, each in enumerate(busy_s)]


def drive(prefixes: HotPrefixes, rate: float, work_s: float, held: dict[int, int]) -> list[float]:
    """Requests at this rate, each with a tail of its own; when copies were made. A copy is held at once."""
    copied, workers = [], targets(3.0, 2.0, 1.0, 0.5)
    for number in range(int(rate * 60.0)):
        now_s = number / rate
        hot = prefixes.note(chain(number), work_s, now_s)
        copy = prefixes.choose(hot, held, workers, BLOCK_BYTES, now_s)
        if copy is not None:
            assert copy.blocks == len(HOT), "the longest that all share"
            held[int(copy.worker_id[1:])] = copy.blocks
            copied.append(now_s)
    return copied


def test_a_prefix_that_one_worker_can_serve_stays_there() -> None:
    assert drive(HotPrefixes(1 << 30, 10.0), rate=10.0, work_s=0.9 * ALARM / 10, held={0: len(HOT)}) == []


@pytest.mark.parametrize(("load", "copies"), [(0.8, 1), (1.2, 2), (1.7, 3), (9.0, 3)])
def test_each_holder_more_takes_its_share(load: float, copies: int) -> None:
    """The first copy is made before one worker is full."""
    prefixes = HotPrefixes(1 << 30, 10.0)
    made = drive(prefixes, rate=20.0, work_s=load / 20, held={0: len(HOT)})
    assert len(made) == copies
    assert all(later - earlier >= AGAIN_S for earlier, later in pairwise(made))
    assert prefixes.copied_bytes == copies * len(HOT) * BLOCK_BYTES


def test_the_idlest_worker_that_reaches_it_gets_the_copy_and_pays_only_what_it_lacks() -> None:
    prefixes = HotPrefixes(1 << 30, 10.0)
    hot = prefixes.note(HOT, 1e3, 0.0)
    assert [each.blocks for each in hot] == [48, 32, 16]
    held = {0: len(HOT), 1: GROUP_BLOCKS}
    assert (
        prefixes.choose(hot, held, targets(0.0, 1.0, 0.5, reach=20), BLOCK_BYTES, 0.0) is not None
    )  # 16 blocks, to w2
    copy = prefixes.choose(hot, held, targets(0.0, 0.1, 0.5), BLOCK_BYTES, 0.0)
    assert copy is not None
    assert (copy.worker_id, copy.num_bytes) == ("w1", (len(HOT) - GROUP_BLOCKS) * BLOCK_BYTES)
    assert prefixes.choose(hot, held, [], BLOCK_BYTES, 100.0) is None


def test_a_hot_prefix_beside_hotter_ones_that_fill_all_places(monkeypatch: pytest.MonkeyPatch) -> None:
    """Long prompts on a slow worker are hot by themselves, each with many prefixes."""
    monkeypatch.setattr(hot_prefixes, "PREFIXES", 8)
    prefixes = HotPrefixes(1 << 30, 10.0)
    for number in range(20):
        work_s = 1e3 if number % 2 else 1e2
        hot = prefixes.note(chain(number)[3 * GROUP_BLOCKS :], work_s, 0.0)
        assert hot
        prefixes.choose(hot, {}, targets(1.0, 0.5), BLOCK_BYTES, 0.0)
        assert len(prefixes) <= 8


@settings(max_examples=60)
@given(st.integers(0, 1 << 30), st.integers(1, 200))
def test_the_budget_holds_in_every_window(seed: int, blocks: int) -> None:
    draw, window_s = random.Random(seed), 10.0
    prefixes = HotPrefixes(blocks * BLOCK_BYTES, window_s)
    spent: list[tuple[float, int]] = []
    now_s = 0.0
    for _ in range(300):
        now_s += draw.expovariate(5.0)
        keys = [
            BlockKey(bytes([draw.randrange(6)]) * 15 + bytes([n])) for n in range(GROUP_BLOCKS * draw.randint(1, 4))
        ]
        hot = prefixes.note(keys, draw.expovariate(0.5), now_s)
        copy = prefixes.choose(hot, {}, targets(1.0, 2.0), BLOCK_BYTES, now_s)
        if copy is not None:
            spent.append((now_s, copy.num_bytes))
        assert sum(n for at, n in spent if at > now_s - window_s) <= blocks * BLOCK_BYTES


def test_what_is_remembered_is_bounded_and_the_hot_ones_stay() -> None:
    prefixes = HotPrefixes(1 << 30, 10.0)
    for number in range(3 * PREFIXES):
        assert len(prefixes) <= PREFIXES + 5
        prefixes.note(chain(number), 0.01, number * 1e-3)
    assert prefixes.note(HOT, 0.0, 3 * PREFIXES * 1e-3)


async def test_the_second_worker_is_asked_to_load_it_and_the_record_says_so() -> None:
    workers = [StubWorker(StubSpec(name, MIXED, has_store=True), Fabric()) for name in ("m0", "m1")]
    async with StubCluster(*workers, policy="cost", limits=with_limits(hot_copy_bytes=1 << 20)) as cluster:
        prompt = 2 * GROUP_BLOCKS * 16 + 1
        keys = block_keys(cluster.fleet.root_key(b""), range(prompt), 16)
        stores = cluster.fleet.stores
        for member in cluster.members():  # both are attached to a node that holds the prompt
            member.store, member.store_node = StoreLife("nobody:1", 1), 0
            member.learner.note_prefill(prompt, 20.0)
        stores.index.join(0)
        stores.index.snapshot_ended(0, 0)
        stores.index.stored(0, 1, 1, keys)  # type: ignore[arg-type]
        sampling = SamplingParams(max_tokens=1, seed=1, temperature=0.0)
        asked = []
        for _ in range(12):
            generation = cluster.start(sampling, prompt_tokens=prompt)
            await assert_exact(generation)
            asked.append(generation.request.request_id)
        await until(lambda: any(worker.prefetches for worker in workers))
        [prefetch] = [each for worker in workers for each in worker.prefetches][:1]
        assert prefetch == pb.Prefetch(keys=b"".join(keys[: 2 * GROUP_BLOCKS]))
        explain = Explainer(cluster.fleet, cluster.dispatcher).explain
        told = [record["hot_prefix"] for request in asked if (record := explain(request)) and record["hot_prefix"]]
        assert told[0]["blocks"] == 2 * GROUP_BLOCKS
        assert told[0]["load"] > ALARM


async def test_decode_workers_that_hold_it_do_not_count_as_holders() -> None:
    """Each that ever took over such a request holds its prefix, and none of them serves the next prompt."""
    fabric = Fabric()
    roles = {"p0": PREFILL, "p1": PREFILL, "d0": DECODE, "d1": DECODE}
    workers = [StubWorker(StubSpec(name, role, has_store=True), fabric) for name, role in roles.items()]
    async with StubCluster(*workers, policy="direct", limits=with_limits(hot_copy_bytes=1 << 20)) as cluster:
        prompt = GROUP_BLOCKS * 16 + 1
        keys = block_keys(cluster.fleet.root_key(b""), range(prompt), 16)
        stores = cluster.fleet.stores
        for member in cluster.members():
            member.store, member.store_node = StoreLife("nobody:1", 1), 0
            member.learner.note_prefill(16, 32.0)  # so the token behind the prefix keeps a worker busy for 2 s
            if member.worker_id != "p1":
                cluster.fleet.index.stored(member.slot, keys)
        stores.index.join(0)
        stores.index.snapshot_ended(0, 0)
        stores.index.stored(0, 1, 1, keys)  # type: ignore[arg-type]
        sampling = SamplingParams(max_tokens=1, seed=1, temperature=0.0)
        # As much as one holder can do, and less than three can.
        for _ in range(6):
            await assert_exact(cluster.start(sampling, prompt_tokens=prompt, target="p0"))
            if cluster.dispatcher.hot.prefixes.copies:
                break
        await until(lambda: any(worker.prefetches for worker in workers))
        assert [bool(worker.prefetches) for worker in workers] == [False, True, False, False]
        loads = [r.copy.load for r in cluster.dispatcher.account.records.recent(40) if r.copy is not None]
        assert ALARM < loads[0] < 2 * ALARM
