"""Policies are pure: the same candidates and turn give the same decision, and the decision says why."""

from __future__ import annotations

from dataclasses import replace

import pytest

from router.policy import POLICIES, Candidate, Candidates, LinkFacts, LoadView, Need, Phase, Policy, Role, Speed
from router.policy.roster import Numbers

NEED = Need(Phase.PROMPT, tokens=64, max_tokens=16, block_size=16)


def worker(worker_id: str, role: Role = Role.PREFILL, **changes: object) -> Candidate:
    base = Candidate(
        worker_id=worker_id,
        role=role,
        alive=True,
        incompatible="",
        max_model_len=4096,
        max_sequences=8,
        total_blocks=100,
        block_bytes=1 << 18,
        load=LoadView(free_blocks=100),
        partners=1,
        link=LinkFacts(up=True),
    )
    return replace(base, **changes)  # type: ignore[arg-type]


def chosen(policy: str, need: Need, *candidates: Candidate, turn: int = 0) -> str | None:
    decision = POLICIES[policy].decide(need, Candidates.of(candidates), turn)
    return decision.chosen.worker_id if decision.chosen else None


def test_the_worker_with_the_prefix_wins_until_its_queue_costs_more() -> None:
    holder = worker("holder", matched_blocks=3)
    assert chosen("cost", NEED, worker("other"), holder) == "holder"
    busy = replace(holder, load=LoadView(waiting_tokens=500))
    assert chosen("cost", NEED, worker("other"), busy) == "other"


def test_remembered_work_separates_workers_that_look_idle() -> None:
    used = worker("a", load=LoadView(recent_tokens=10_000.0))
    assert chosen("cost", NEED, used, worker("b")) == "b"


@pytest.mark.parametrize("policy", ["cost", "round_robin"])
def test_equal_workers_take_turns(policy: str) -> None:
    workers = [worker(name) for name in "abc"]
    assert [chosen(policy, NEED, *workers, turn=turn) for turn in range(6)] == ["a", "b", "c"] * 2


def test_random_uses_every_worker_and_repeats_with_the_turn() -> None:
    workers = [worker(name) for name in "abc"]
    picks = [chosen("random", NEED, *workers, turn=turn) for turn in range(200)]
    assert picks == [chosen("random", NEED, *workers, turn=turn) for turn in range(200)]
    assert all(picks.count(name) > 40 for name in "abc")


def test_direct_obeys_a_name_and_is_cost_without_one() -> None:
    workers = [worker("a", matched_blocks=4), worker("b")]
    assert chosen("direct", replace(NEED, target="b"), *workers) == "b"
    assert chosen("direct", replace(NEED, target="nobody"), *workers) is None
    assert chosen("direct", NEED, *workers) == "a"


def test_decode_prefers_the_prefix_then_the_shorter_batch() -> None:
    need = replace(NEED, phase=Phase.DECODE, tokens=1520)
    holder = worker("holder", Role.DECODE, matched_blocks=95)
    other = worker("other", Role.DECODE)
    assert chosen("cost", need, holder, other) == "holder"
    busy = replace(holder, load=LoadView(free_blocks=100, sequences=5))
    assert chosen("cost", need, busy, other) == "other"


@pytest.mark.parametrize(
    ("phase", "candidate", "reason"),
    [
        (Phase.PROMPT, worker("w", alive=False), "not heard from"),
        (Phase.PROMPT, worker("w", incompatible="block_size 32, the fleet has 16"), "block_size 32"),
        (Phase.PROMPT, worker("w", Role.DECODE), "role decode"),
        (Phase.PROMPT, worker("w", partners=0), "no open link to a decode worker"),
        (Phase.PROMPT, worker("w", max_model_len=64), "64 tokens leave no room"),
        (Phase.PROMPT, worker("w", total_blocks=4), "needs 5 blocks of 4"),
        (Phase.DECODE, worker("w", Role.MIXED), "role mixed"),
        (Phase.DECODE, worker("w", Role.DECODE, link=None), "no link"),
        (Phase.DECODE, worker("w", Role.DECODE, link=LinkFacts(up=False, error="refused")), "link down: refused"),
        (Phase.DECODE, worker("w", Role.DECODE, load=LoadView(free_blocks=4)), "needs 5 blocks, 4 are free"),
        (Phase.DECODE, worker("w", Role.DECODE, load=LoadView(free_blocks=9, sequences=8)), "8 sequences of 8"),
    ],
)
def test_a_filtered_candidate_is_named_with_its_reason(phase: Phase, candidate: Candidate, reason: str) -> None:
    decision = POLICIES["cost"].decide(replace(NEED, phase=phase), Candidates.of([candidate]), 0)
    assert decision.chosen is None
    assert reason in decision.why_not()


@pytest.mark.parametrize("phase", [Phase.PROMPT, Phase.WHOLE])
@pytest.mark.parametrize("short", [{"max_model_len": 64}, {"total_blocks": 4}])
def test_one_worker_without_room_is_left_out_alone(phase: Phase, short: dict[str, int]) -> None:
    candidates = Candidates.of([worker("a"), worker("b", **short), worker("c")])
    decision = POLICIES["cost"].decide(replace(NEED, phase=phase), candidates, 0)
    assert [each.worker_id for each in decision.filtered] == ["b"]
    assert decision.num_filtered == 1
    assert {each.worker_id for each in decision.considered} == {"a", "c"}


def test_any_role_may_run_the_whole_request() -> None:
    need = replace(NEED, phase=Phase.WHOLE)
    for role in Role:
        assert chosen("cost", need, worker("w", role, partners=0, link=None)) == "w"


def test_workers_that_failed_are_avoided() -> None:
    need = replace(NEED, avoid=frozenset({"a"}))
    assert chosen("cost", need, worker("a", matched_blocks=4), worker("b")) == "b"


def test_a_decision_keeps_every_term_and_the_runner_up() -> None:
    decision = POLICIES["cost"].decide(NEED, Candidates.of([worker("a"), worker("b", matched_blocks=2)]), 0)
    assert [each.worker_id for each in decision.considered] == ["b", "a"]
    assert decision.runner_up is not None
    assert decision.runner_up.worker_id == "a"
    assert dict(decision.considered[0].terms) == {
        "uncached": 0.016,
        "fetch": 0.0,
        "work": 0.032,
        "queued": 0.0,
        "recent": 0.0,
        "shared_step": 0.0,
    }
    assert all(each.cost == sum(each.terms.values()) for each in decision.considered)


def test_least_load_and_power_of_two_look_at_load_only() -> None:
    workers = [worker(name, load=LoadView(waiting_tokens=100 * n), matched_blocks=n) for n, name in enumerate("abcd")]
    assert {chosen("least_load", NEED, *workers, turn=turn) for turn in range(20)} == {"a"}
    two = [chosen("power_of_two", NEED, *workers, turn=turn) for turn in range(200)]
    assert set(two) == {"a", "b", "c"}  # the worst loses against anyone
    assert chosen("power_of_two", NEED, workers[3]) == "d"


def test_prefix_only_goes_where_the_prefix_is_whatever_the_load() -> None:
    busy = worker("holder", matched_blocks=1, load=LoadView(waiting_tokens=10**6))
    assert chosen("prefix_only", NEED, worker("idle"), busy) == "holder"


def test_a_session_stays_and_moves_only_when_its_worker_is_gone() -> None:
    workers = [worker(name, load=LoadView(waiting_tokens=turn)) for turn, name in enumerate("abcd")]
    homes = {}
    for number in range(40):
        need = replace(NEED, session=f"s{number}")
        homes[number] = home = chosen("session", need, *workers)
        assert home == chosen("session", need, *reversed(workers), turn=5)
        rest = [each for each in workers if each.worker_id != "a"]
        assert home == "a" or chosen("session", need, *rest) == home
    assert set(homes.values()) == set("abcd")
    assert chosen("session", NEED, *workers) == chosen("cost", NEED, *workers) == "a"


def test_a_slow_worker_costs_more_for_the_same_tokens() -> None:
    slow = worker("a", speed=Speed(prefill_tokens_per_s=((7, 100.0),)))
    assert chosen("cost", NEED, slow, worker("b")) == "b"


def test_a_policy_of_ones_own_is_a_scorer_over_columns() -> None:
    def free_memory(need: Need, candidates: Candidates) -> Numbers:
        return -candidates.seen.free_blocks

    emptiest = Policy("emptiest", scorers={phase: {"free": free_memory} for phase in Phase})
    workers = [worker(name, load=LoadView(free_blocks=blocks)) for name, blocks in (("a", 60), ("b", 90), ("c", 70))]
    decision = emptiest.decide(NEED, Candidates.of(workers), 0)
    assert [each.worker_id for each in decision.considered] == ["b", "c", "a"]
    assert decision.runner_up_id == "c"
    assert decision.considered[0].terms == {"free": -90.0}
