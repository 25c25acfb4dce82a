"""Every request leaves a record: what was weighed, what was predicted, what happened; a dry run decides the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pdserve.protocol import worker_pb2 as pb
from pdserve.timeline import Timeline
from router.bench.stub_worker import Fabric, StubSpec, StubWorker
from router.explain import Explainer
from router.policy import POLICIES
from router.records import Record, Records
from router.routed import RoutedGeneration
from router.slo import CLASSES
from router.wishes import Wishes
from tests.support.stub_cluster import DECODE, GREEDY, PREFILL, StubCluster, accounted, assert_exact, until


def four() -> list[StubWorker]:
    fabric = Fabric()
    roles = {"p0": PREFILL, "p1": PREFILL, "d0": DECODE, "d1": DECODE}
    return [StubWorker(StubSpec(name, role), fabric) for name, role in roles.items()]


async def run(cluster: StubCluster) -> RoutedGeneration:
    generation = cluster.start(GREEDY)
    await assert_exact(generation)
    return generation


async def test_a_record_has_all_candidates_and_what_happened() -> None:
    async with StubCluster(*four(), policy="cost") as cluster:
        explainer = Explainer(cluster.fleet, cluster.dispatcher)
        generation = await run(cluster)
        record = explainer.explain(generation.request.request_id)
        assert record is not None
        prompt, decode = record["decisions"]
        assert (prompt["phase"], decode["phase"]) == ("prompt", "decode")
        assert [prompt["chosen"], decode["chosen"]] == generation.workers == record["actual"]["workers"]
        assert {each["worker_id"] for each in prompt["candidates"]} == {"p0", "p1"}
        assert {each["worker_id"]: each["reason"] for each in prompt["filtered"]} == {
            "d0": "role decode",
            "d1": "role decode",
        }
        for each in prompt["candidates"] + decode["candidates"]:
            assert sum(each["terms_s"].values()) == pytest.approx(each["cost_s"])
        assert all(each["move_bytes"] > 0 for each in decode["candidates"])
        assert record["predicted"]["ttft_s"] > 0
        assert sum(record["actual"]["ttft_stages_s"].values()) == pytest.approx(record["actual"]["ttft_s"])
        assert record["end"] == "length"
        json.dumps(record)


@pytest.mark.parametrize("policy", sorted(POLICIES))
async def test_a_dry_run_decides_as_the_request_that_follows(policy: str) -> None:
    async with StubCluster(*four(), policy="cost") as cluster:
        for number in range(6):
            wishes = Wishes(policy=policy, session=f"s{number}", target="p1" if policy == "direct" else None)
            request = cluster.request(GREEDY, prompt_tokens=40 + 16 * (number % 2))
            foreseen = cluster.dispatcher.dry_run(request, wishes)
            again = cluster.dispatcher.dry_run(request, wishes)  # it changes nothing
            assert again.chosen is not None
            assert foreseen.chosen is not None
            assert again.chosen.worker_id == foreseen.chosen.worker_id
            generation = cluster.dispatcher.start(request, Timeline(received_s=0.0), wishes)
            await assert_exact(generation)
            record = cluster.dispatcher.account.records.find(request.request_id)
            assert record is not None
            assert record.first is not None
            assert record.first.policy == policy
            assert record.first.chosen is not None
            assert record.first.chosen.worker_id == foreseen.chosen.worker_id
            assert [each.worker_id for each in record.first.considered] == [
                each.worker_id for each in foreseen.considered
            ]


async def test_speed_and_goodput_are_learned_from_what_ended() -> None:
    async with StubCluster(*four(), policy="cost") as cluster:
        for _ in range(3):
            await run(cluster)
        account = cluster.dispatcher.account
        assert account.predictor.errors["ttft"].quantile(0.5) is not None
        slo = Explainer(cluster.fleet, cluster.dispatcher).slo()
        assert slo["classes"]["standard"]["requests"] == 3
        assert sum(pair["requests"] for pair in slo["pairs"]) == 3


async def test_the_pair_matrix_has_every_prefill_worker_with_every_decode_worker() -> None:
    async with StubCluster(*four()) as cluster:
        pairs = Explainer(cluster.fleet, cluster.dispatcher).pairs()["pairs"]
        assert {(pair["prefill"], pair["decode"]) for pair in pairs} == {
            (p, d) for p in ("p0", "p1") for d in ("d0", "d1")
        }
        assert all(pair["compatible"] and pair["up"] for pair in pairs)


async def test_a_pair_shows_its_measured_bandwidth_and_the_last_error_after_it_is_over_too() -> None:
    async with StubCluster(*four()) as cluster:

        def pair() -> dict[str, object]:
            pairs = Explainer(cluster.fleet, cluster.dispatcher).pairs()["pairs"]
            return next(each for each in pairs if (each["prefill"], each["decode"]) == ("p0", "d1"))

        assert (pair()["last_error"], pair()["bytes_per_second"]) == (None, None)
        [session] = cluster.workers["p0"].sessions
        link = pb.LinkReport(peer_id="d1", peer_incarnation=1, transport="stub")
        session.send(link=pb.LinkReport(peer_id="d1", peer_incarnation=1, error="no route"))
        await until(lambda: not pair()["up"])
        assert pair()["error"] == pair()["last_error"] == "no route"
        link.up, link.bytes_per_second = True, 5e9
        session.send(link=link)
        await until(lambda: bool(pair()["up"]))
        assert (pair()["error"], pair()["last_error"], pair()["bytes_per_second"]) == ("", "no route", 5e9)
        cluster.fleet.pairing.distrust("p0", "d1")
        assert (pair()["up"], pair()["last_error"]) == (False, "a hand-over failed")


async def test_an_aborted_request_misses_no_objective() -> None:
    async with StubCluster(*four()) as cluster:
        generation = cluster.start(GREEDY)
        generation.abort()
        await accounted()
        record = cluster.dispatcher.account.records.find(generation.request.request_id)
        assert record is not None
        assert record.end == "abort"
        assert not cluster.dispatcher.account.goodput.outcomes


async def test_a_client_that_leaves_too_late_to_be_served_well_has_been_missed() -> None:
    async with StubCluster(*four()) as cluster:
        generation = cluster.start(GREEDY)
        generation.timeline.received_s -= CLASSES["standard"].ttft_s
        generation.abort()
        await accounted()
        [(_, _, _, stage)] = cluster.dispatcher.account.goodput.outcomes
        assert stage == "failed"


async def test_an_answer_that_a_stop_string_completes_is_good() -> None:
    async with StubCluster(*four()) as cluster:
        generation = cluster.start(GREEDY)
        await anext(aiter(generation))
        generation.finish()
        await accounted()
        record = cluster.dispatcher.account.records.find(generation.request.request_id)
        assert record is not None
        assert (record.end, record.missed) == ("stop", None)
        assert cluster.dispatcher.account.goodput.by_class() == {("standard", ""): 1}


def record(number: int, label: str = "") -> Record:
    return Record(f"r{number}", label, 10, CLASSES["standard"])


def test_the_ring_forgets_the_oldest_and_its_label() -> None:
    records = Records(capacity=2)
    records.open(record(0, "old"))
    records.open(record(1, "same"))
    newest = records.open(record(2, "same"))
    assert len(records) == 2
    assert records.find("r0") is None
    assert records.find("old") is None
    assert records.find("same") is newest
    records.open(record(3))
    assert records.find("same") is newest


def test_the_log_has_a_line_a_request(tmp_path: Path) -> None:
    file = tmp_path / "decisions.jsonl"
    records = Records(log_file=file)
    for number in range(2):
        ended = records.open(record(number))
        ended.finish("stop", Timeline(received_s=0.0), 0, ["w"])
        records.closed(ended)
    records.close()
    assert [json.loads(line)["request_id"] for line in file.read_text().splitlines()] == ["r0", "r1"]
