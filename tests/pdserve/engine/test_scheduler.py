"""What a step computes, who waits, who is preempted, and how it ends: case by case on a few blocks."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kvstore.keys import root_key
from pdserve.engine.config import EngineConfig
from pdserve.engine.engine import Engine
from pdserve.engine.sequence import Status
from pdserve.errors import ConfigError
from pdserve.request import FinishReason, SamplingParams
from tests.support.tiny_engine import (
    BLOCK_SIZE,
    add,
    assert_idle,
    chunks,
    expected_of,
    make_sequence,
    output_of,
    prompt,
    run_to_end,
    step,
    tiny_engine,
)

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
    for twin in twins:
        twin.sampling = replace(twin.sampling, prompt_logprobs=0)  # each is to compute its whole prompt
    add(engine, *twins)
    step(engine)
    assert twins[0].block_ids[:2] == twins[1].block_ids[:2]
    assert twins[0].block_ids[2] != twins[1].block_ids[2]
    assert engine.pool.ledger(0.0).held == 4
    run_to_end(engine)
    assert output_of(twins[0]) == output_of(twins[1]) == expected_of(twins[0], engine)
    assert_idle(engine)


def test_a_prompt_that_others_begin_with_is_computed_once() -> None:
    engine = tiny_engine(32, tokens=64)
    first, *others = sequences = [make_sequence(name, prompt(0, 9), max_tokens=4) for name in "abcd"]
    add(engine, *sequences)
    assert chunks(engine) == {"a": 9}
    assert chunks(engine) == {"a": 1, "b": 1, "c": 1, "d": 1}
    assert all(other.block_ids[:2] == first.block_ids[:2] for other in others)
    run_to_end(engine)
    assert all(output_of(each) == expected_of(each, engine) for each in sequences)
    assert_idle(engine)


def test_a_prompt_waits_only_for_the_block_that_it_needs_next() -> None:
    engine = tiny_engine(32, tokens=64)
    add(
        engine,
        make_sequence("a", prompt(0, 9)),
        make_sequence("b", [60, *prompt(0, 8)]),
        make_sequence("c", prompt(0, 3)),
    )
    assert chunks(engine) == {"a": 9, "b": 9, "c": 3}


def test_sequences_that_share_a_prefix_of_most_of_the_pool_run_together() -> None:
    engine = tiny_engine(16, tokens=64)
    text = prompt(0, 41)
    add(engine, first := make_sequence("first", text, max_tokens=8))
    step(engine)
    add(engine, second := make_sequence("second", [*text[:40], 60], max_tokens=4))
    assert chunks(engine) == {"first": 1, "second": 1}
    run_to_end(engine)
    assert [output_of(s) for s in (first, second)] == [expected_of(s, engine) for s in (first, second)]


def test_prompt_leaves_a_block_to_each_sequence_that_decodes() -> None:
    engine = tiny_engine(8, tokens=64)
    add(engine, short := make_sequence("short", prompt(0, 7), max_tokens=4))
    step(engine)
    add(engine, long := make_sequence("long", prompt(20, 24), max_tokens=2))
    assert chunks(engine) == {"short": 1, "long": 20}
    run_to_end(engine)
    assert engine.scheduler.num_preempted == 0
    assert [output_of(s) for s in (short, long)] == [expected_of(s, engine) for s in (short, long)]


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
        assert sequence.cached_tokens == 0, "what it finds of its own after a preemption is no prefix hit"
    assert_idle(engine)


def test_preempted_sequence_comes_before_those_that_never_ran() -> None:
    engine = tiny_engine(8, tokens=32, sequences=2)
    a, b = (make_sequence(name, prompt(20 * i, 8), max_tokens=16) for i, name in enumerate("ab"))
    add(engine, a, b, c := make_sequence("c", prompt(40, 3), max_tokens=1))
    while b.status is not Status.WAITING or b.num_output_tokens == 0:
        step(engine)
    assert list(engine.scheduler.waiting) == [b, c]
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
    assert engine.pool.ledger(5.0 + engine.config.handoff_s).overdue == ["s"]
    engine.finish(sequence)
    assert_idle(engine)


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


@pytest.mark.parametrize("most_tokens", [None, 1, 5, 1000])
def test_warm_up_leaves_no_trace(most_tokens: int | None) -> None:
    for max_model_len in (1, 2, 3, 32):
        engine = tiny_engine(8, max_model_len=max_model_len)
        engine.warm_up(most_tokens)
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
        broken.setattr(engine.runner, "launch", fail)
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
