"""What a step computes, who waits, who is preempted, what a reservation takes: case by case on a few blocks."""

from __future__ import annotations

import pytest

from kvstore.errors import NoRoom
from kvstore.keys import root_key
from kvstore.pool import HoldKind
from pdserve.engine.config import EngineConfig
from pdserve.engine.engine import Engine
from pdserve.engine.sequence import Sequence, Status
from pdserve.errors import ConfigError
from pdserve.request import FinishReason, SamplingParams
from tests.support.tiny_engine import (
    BLOCK_SIZE,
    assert_idle,
    expected_of,
    make_sequence,
    output_of,
    run_to_end,
    step,
    tiny_engine,
)


def add(engine: Engine, *sequences: Sequence) -> None:
    for sequence in sequences:
        engine.scheduler.add(sequence)


def chunks(engine: Engine) -> dict[str, int]:
    """Run one step; tokens computed by sequence."""
    plan, _ = step(engine)
    return {chunk.sequence.name: chunk.num_tokens for chunk in plan.chunks}


def prompt(first: int, length: int) -> list[int]:
    return [(first + i) % 50 for i in range(length)]


# --- one step --------------------------------------------------------------------------------------------------------


def test_long_prompt_is_cut_into_chunks_of_the_budget() -> None:
    engine = tiny_engine(16, tokens=8)
    long = make_sequence("long", prompt(0, 19), max_tokens=2)
    add(engine, long)
    assert [chunks(engine) for _ in range(4)] == [{"long": 8}, {"long": 8}, {"long": 3}, {"long": 1}]
    assert output_of(long) == expected_of(long, engine)
    assert_idle(engine)


def test_decodes_come_before_chunks_and_chunks_before_newcomers() -> None:
    engine = tiny_engine(32, tokens=10, sequences=4)
    add(engine, make_sequence("first", prompt(0, 3), max_tokens=8))
    assert chunks(engine) == {"first": 3}
    add(engine, make_sequence("second", prompt(10, 15)), make_sequence("third", prompt(30, 5)))
    assert chunks(engine) == {"first": 1, "second": 9}
    assert chunks(engine) == {"first": 1, "second": 6, "third": 3}
    assert chunks(engine) == {"first": 1, "second": 1, "third": 2}
    run_to_end(engine)
    assert_idle(engine)


def test_no_more_sequences_run_than_allowed() -> None:
    engine = tiny_engine(32, tokens=32, sequences=2)
    add(engine, *(make_sequence(str(i), prompt(i, 3), max_tokens=2) for i in range(3)))
    assert chunks(engine) == {"0": 3, "1": 3}
    assert chunks(engine) == {"0": 1, "1": 1}
    assert chunks(engine) == {"2": 3}


def test_queue_says_when_it_is_full() -> None:
    config = EngineConfig(4, BLOCK_SIZE, max_batched_tokens=8, max_sequences=1, max_waiting=2, max_model_len=16)
    source = tiny_engine(4)
    engine = Engine(config, source.pool, source.runner)
    add(engine, make_sequence("a", [1]))
    assert not engine.scheduler.full
    add(engine, make_sequence("b", [1]))
    assert engine.scheduler.full


def test_prompt_is_reused_by_whole_blocks_and_its_last_token_is_always_computed() -> None:
    engine = tiny_engine(16, tokens=32)
    text = prompt(0, 12)
    for length, cached, computed in ((12, 0, 12), (12, 8, 4), (11, 8, 3), (9, 8, 1), (8, 4, 4), (3, 0, 3)):
        sequence = make_sequence("again", text[:length], max_tokens=1)
        add(engine, sequence)
        assert chunks(engine) == {"again": computed}, length
        assert sequence.cached_tokens == cached
        assert output_of(sequence) == expected_of(sequence, engine)
    assert_idle(engine)


def test_answer_is_reused_by_the_next_turn() -> None:
    engine = tiny_engine(16, tokens=32)
    first = make_sequence("first", prompt(0, 6), max_tokens=7)
    add(engine, first)
    run_to_end(engine)
    # 6 + 7 tokens, the last one without KV: three full blocks.
    second = make_sequence("second", [*first.token_ids, 5, 6], max_tokens=3)
    add(engine, second)
    run_to_end(engine)
    assert second.cached_tokens == 12
    assert output_of(second) == expected_of(second, engine)


def test_other_tenant_finds_nothing() -> None:
    engine = tiny_engine(16)
    for salt in (b"one", b"two", b"one"):
        sequence = make_sequence("s", prompt(0, 9), root=root_key(b"model", salt))
        add(engine, sequence)
        run_to_end(engine)
    assert sequence.cached_tokens == 8
    add(engine, other := make_sequence("s", prompt(0, 9), root=root_key(b"model", b"three")))
    run_to_end(engine)
    assert other.cached_tokens == 0


def test_blocks_computed_twice_at_the_same_time_are_shared_afterwards() -> None:
    engine = tiny_engine(32, tokens=32)
    twins = [make_sequence(name, prompt(0, 9), max_tokens=4) for name in "ab"]
    add(engine, *twins)
    step(engine)
    assert twins[0].block_ids[:2] == twins[1].block_ids[:2]
    assert twins[0].block_ids[2] != twins[1].block_ids[2]
    assert engine.pool.ledger(0.0).held == 4
    run_to_end(engine)
    assert output_of(twins[0]) == output_of(twins[1]) == expected_of(twins[0], engine)
    assert_idle(engine)


def test_sequences_that_share_a_prefix_of_most_of_the_pool_run_together() -> None:
    engine = tiny_engine(16, tokens=64)
    text = prompt(0, 41)
    add(engine, first := make_sequence("first", text, max_tokens=8))
    step(engine)
    add(engine, second := make_sequence("second", [*text[:40], 60], max_tokens=4))
    assert chunks(engine) == {"first": 1, "second": 1}
    run_to_end(engine)
    assert [output_of(s) for s in (first, second)] == [expected_of(s, engine) for s in (first, second)]


# --- preemption ------------------------------------------------------------------------------------------------------


def test_youngest_is_preempted_and_goes_on_exactly_where_it_was() -> None:
    engine = tiny_engine(8, tokens=32)
    sequences = [make_sequence(name, prompt(20 * i, 8), max_tokens=16) for i, name in enumerate("ab")]
    add(engine, *sequences)
    tokens = run_to_end(engine)
    assert engine.scheduler.num_preempted > 0
    assert [t.sequence.name for t in tokens if t.finish_reason] == ["a", "b"]
    for sequence in sequences:
        assert output_of(sequence) == expected_of(sequence, engine)
        assert [t.index for t in tokens if t.sequence is sequence] == list(range(16))
    assert_idle(engine)


def test_preempted_sequence_comes_before_those_that_never_ran() -> None:
    engine = tiny_engine(8, tokens=32, sequences=2)
    a, b = (make_sequence(name, prompt(20 * i, 8), max_tokens=16) for i, name in enumerate("ab"))
    add(engine, a, b, make_sequence("c", prompt(40, 3), max_tokens=1))
    while b.status is not Status.WAITING or b.num_output_tokens == 0:
        step(engine)
    assert engine.scheduler.waiting[0] is b
    run_to_end(engine)
    assert_idle(engine)


def test_sequence_that_fills_the_whole_pool_runs_to_its_end() -> None:
    engine = tiny_engine(4, tokens=8)
    sequence = make_sequence("big", prompt(0, 13), max_tokens=100)
    add(engine, sequence)
    tokens = run_to_end(engine)
    assert tokens[-1].finish_reason is FinishReason.LENGTH
    assert len(sequence) == 16
    assert_idle(engine)


def test_half_computed_prompts_do_not_starve_each_other() -> None:
    engine = tiny_engine(8, tokens=8)
    sequences = [make_sequence(name, prompt(20 * i, 25), max_tokens=6) for i, name in enumerate("ab")]
    add(engine, *sequences)
    run_to_end(engine, max_steps=60)
    assert [output_of(s) for s in sequences] == [expected_of(s, engine) for s in sequences]
    assert_idle(engine)


# --- ending ----------------------------------------------------------------------------------------------------------


def test_stop_token_ends_a_sequence_and_is_its_last_token() -> None:
    engine = tiny_engine()
    plain = make_sequence("plain", prompt(0, 5), max_tokens=8)
    stop = expected_of(plain, engine)[3]
    sampling = SamplingParams(max_tokens=8, seed=0, temperature=0.0, stop_token_ids=(stop,))
    add(engine, sequence := make_sequence("s", prompt(0, 5), sampling=sampling))
    tokens = run_to_end(engine)
    assert tokens[-1].finish_reason is FinishReason.STOP
    assert output_of(sequence) == expected_of(plain, engine)[:4]
    assert_idle(engine)


@pytest.mark.parametrize("status", list(Status))
def test_finish_gives_everything_back_whatever_the_sequence_was_doing(status: Status) -> None:
    engine = tiny_engine(16)
    sequence = make_sequence("s", prompt(0, 9), max_tokens=1 if status is Status.FINISHED else 4)
    sequence.prefill_only = status is Status.HANDING_OFF
    if status is Status.ARRIVING:
        engine.scheduler.reserve(sequence, 0.0, 1.0)
    elif status is not Status.NEW:
        add(engine, sequence)
        if status is not Status.WAITING:
            step(engine)
    assert sequence.status is status
    assert engine.finish(sequence) == []
    assert sequence.status is Status.FINISHED
    assert engine.finish(sequence) == []
    assert engine.idle
    assert_idle(engine)


def test_preempted_sequence_can_be_finished() -> None:
    engine = tiny_engine(8, tokens=32)
    add(engine, *(make_sequence(name, prompt(20 * i, 8), max_tokens=16) for i, name in enumerate("ab")))
    while not engine.scheduler.num_preempted:
        step(engine)
    engine.finish(engine.scheduler.waiting[0])
    run_to_end(engine)
    assert_idle(engine)


def test_prefill_only_keeps_its_blocks_lent_until_it_is_finished() -> None:
    engine = tiny_engine(16)
    sequence = make_sequence("s", prompt(0, 9), max_tokens=4, prefill_only=True)
    add(engine, sequence)
    plan = engine.schedule(0.0)
    (token,) = engine.execute(plan, 5.0)
    assert (token.index, token.finish_reason) == (0, None)
    assert sequence.status is Status.HANDING_OFF
    assert engine.idle
    ledger = engine.pool.ledger(5.0)
    assert (ledger.sending, ledger.held) == (3, 0)
    assert ledger.holds[0].expires_in_s == engine.config.handoff_s
    assert engine.pool.expired(5.0 + engine.config.handoff_s) == ["s"]
    engine.finish(sequence)
    assert_idle(engine)


# --- arriving --------------------------------------------------------------------------------------------------------


def test_reservation_takes_what_is_here_and_asks_for_the_rest_only() -> None:
    engine = tiny_engine(16)
    add(engine, make_sequence("before", prompt(0, 9), max_tokens=1))
    run_to_end(engine)
    sequence = make_sequence("s", prompt(0, 14))
    assert engine.scheduler.reserve(sequence, 0.0, 9.0) == 2
    engine.pool.receive(sequence.blocks[2:])
    ledger = engine.pool.ledger(0.0)
    assert (ledger.held, ledger.receiving) == (2, 2)
    assert sequence.status is Status.ARRIVING
    quarantined = engine.finish(sequence)
    assert set(quarantined) == set(sequence.blocks[2:])
    assert engine.pool.ledger(0.0).quarantined == 2
    for ref in quarantined:
        engine.pool.drained(ref)
    assert_idle(engine)


def test_reservation_of_a_prompt_that_is_all_here_receives_nothing() -> None:
    engine = tiny_engine(16)
    add(engine, make_sequence("before", prompt(0, 9), max_tokens=1))
    run_to_end(engine)
    sequence = make_sequence("s", prompt(0, 8), max_tokens=5)
    assert engine.scheduler.reserve(sequence, 0.0, 9.0) == 2
    assert sequence.num_missing_blocks == 0
    engine.scheduler.arrived(sequence, expected_of(sequence, engine)[:1])
    run_to_end(engine)
    assert output_of(sequence) == expected_of(sequence, engine)
    assert_idle(engine)


def refused(engine: Engine, sequence: Sequence) -> None:
    """Refused, and nothing has changed."""
    before = engine.pool.ledger(0.0), engine.pool.visible_keys()
    with pytest.raises(NoRoom):
        engine.scheduler.reserve(sequence, 0.0, 9.0)
    assert (engine.pool.ledger(0.0), engine.pool.visible_keys()) == before
    assert sequence.status is Status.NEW
    assert not sequence.blocks
    assert sequence.name not in engine.scheduler.arriving


def test_refused_reservation_takes_nothing_and_may_be_tried_again() -> None:
    engine = tiny_engine(8)
    add(engine, running := make_sequence("running", prompt(0, 15), max_tokens=4))
    step(engine)
    sequence = make_sequence("s", [*prompt(0, 12), *prompt(30, 9)])
    refused(engine, sequence)
    engine.finish(running)
    assert engine.scheduler.reserve(sequence, 0.0, 9.0) == 3
    engine.finish(sequence)
    assert_idle(engine)


def test_reservation_is_refused_when_all_places_are_taken() -> None:
    engine = tiny_engine(16, sequences=2)
    add(engine, make_sequence("running", prompt(0, 3)))
    step(engine)
    engine.scheduler.reserve(make_sequence("arriving", prompt(10, 3)), 0.0, 9.0)
    refused(engine, make_sequence("s", prompt(20, 3)))


def test_reservation_is_refused_while_quarantine_holds_the_room() -> None:
    engine = tiny_engine(8)
    first = make_sequence("first", prompt(0, 20))
    engine.scheduler.reserve(first, 0.0, 9.0)
    engine.pool.receive(first.blocks)
    quarantined = engine.finish(first)
    second = make_sequence("second", prompt(30, 20))
    refused(engine, second)
    for ref in quarantined:
        engine.pool.drained(ref)
    assert engine.scheduler.reserve(second, 0.0, 9.0) == 0


def test_reservations_do_not_overtake_the_sequence_that_waits_for_a_place() -> None:
    engine = tiny_engine(16, sequences=1)
    add(engine, make_sequence("a", prompt(0, 3), max_tokens=1))
    step(engine)
    add(engine, make_sequence("b", prompt(10, 3), max_tokens=1))
    refused(engine, make_sequence("newcomer", prompt(20, 3)))
    assert chunks(engine) == {"b": 3}


def test_reservations_do_not_starve_a_preempted_sequence() -> None:
    engine = tiny_engine(12, tokens=32)
    a, b = (make_sequence(name, prompt(20 * i, 16), max_tokens=20) for i, name in enumerate("ab"))
    add(engine, a, b)
    while b.status is not Status.WAITING or b.num_output_tokens == 0:
        step(engine)
    engine.finish(a)
    # The room that has become free is just enough for what was preempted.
    refused(engine, make_sequence("newcomer", prompt(40, 24)))
    run_to_end(engine)
    assert output_of(b) == expected_of(b, engine)


def test_reservations_do_not_take_the_room_of_a_half_computed_prompt() -> None:
    engine = tiny_engine(12, tokens=8)
    add(engine, long := make_sequence("long", prompt(0, 32), max_tokens=4))
    step(engine)
    refused(engine, make_sequence("newcomer", prompt(40, 16)))
    small = make_sequence("small", prompt(40, 4))
    assert engine.scheduler.reserve(small, 0.0, 9.0) == 0
    run_to_end(engine)
    assert output_of(long) == expected_of(long, engine)


def test_running_sequence_waits_for_blocks_that_are_arriving_or_quarantined() -> None:
    engine = tiny_engine(4)
    blocker = make_sequence("blocker", prompt(0, 12))
    engine.scheduler.reserve(blocker, 0.0, 9.0)
    engine.pool.receive(blocker.blocks)
    add(engine, sequence := make_sequence("s", prompt(20, 4), max_tokens=3))
    quarantined = engine.finish(blocker)
    assert chunks(engine) == {"s": 4}
    assert chunks(engine) == {}
    for ref in quarantined:
        engine.pool.drained(ref)
    run_to_end(engine)
    assert output_of(sequence) == expected_of(sequence, engine)
    assert_idle(engine)


def test_hold_of_an_arriving_sequence_loses_its_deadline_once_it_runs() -> None:
    engine = tiny_engine(8)
    sequence = make_sequence("s", prompt(0, 6))
    engine.scheduler.reserve(sequence, 0.0, 9.0)
    assert engine.pool.expired(9.0) == ["s"]
    engine.scheduler.arrived(sequence, [7])
    assert engine.pool.expired(1e9) == []
    assert engine.pool.ledger(0.0).holds[0].kind == HoldKind.COMPUTE.value


# --- limits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"num_blocks": 0},
        {"block_size": -1},
        {"max_batched_tokens": 3, "max_sequences": 4},
        {"num_blocks": 3},
        {"max_waiting": 0},
    ],
)
def test_limits_that_cannot_work_are_refused(change: dict[str, int]) -> None:
    good = {"num_blocks": 4, "block_size": 4, "max_batched_tokens": 8, "max_sequences": 4, "max_model_len": 16}
    EngineConfig(**good)
    with pytest.raises(ConfigError):
        EngineConfig(**{**good, **change})


def test_warm_up_leaves_no_trace() -> None:
    for max_model_len in (1, 2, 3, 32):
        engine = tiny_engine(8, max_model_len=max_model_len)
        engine.warm_up()
        assert_idle(engine)
        assert engine.pool.visible_keys() == []
        assert engine.pool.drain_events().stored == ()


def test_failed_step_leaves_nothing_visible_and_gives_everything_back(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = tiny_engine(16, tokens=8)
    add(engine, running := make_sequence("running", prompt(0, 5)), other := make_sequence("other", prompt(20, 12)))
    step(engine)
    visible = engine.pool.visible_keys()

    def fail(*_: object) -> None:
        raise RuntimeError("the model broke")

    plan = engine.schedule(0.0)
    with monkeypatch.context() as broken:
        broken.setattr(engine.runner, "run", fail)
        with pytest.raises(RuntimeError):
            engine.execute(plan, 0.0)
    assert engine.pool.visible_keys() == visible
    for chunk in plan.chunks:
        assert engine.finish(chunk.sequence) == []
    assert {running.status, other.status} == {Status.FINISHED}
    add(engine, again := make_sequence("again", prompt(0, 9)))
    run_to_end(engine)
    assert output_of(again) == expected_of(again, engine)
    assert_idle(engine)
