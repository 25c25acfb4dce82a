"""What an arriving sequence takes, when it is refused, and that it neither overtakes nor starves those before it."""

from __future__ import annotations

import pytest

from kvstore.errors import NoRoom
from kvstore.pool import HoldKind
from pdserve.engine.engine import Engine
from pdserve.engine.sequence import Sequence, Status
from tests.support.tiny_engine import (
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
    assert chunks(engine) == {"s": 1}, "nothing of the prompt is computed again"
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


def test_arrived_sequence_can_be_found_at_once_and_has_no_deadline() -> None:
    engine = tiny_engine(8)
    sequence = make_sequence("s", prompt(0, 6))
    engine.scheduler.reserve(sequence, 0.0, 9.0)
    assert engine.pool.ledger(9.0).overdue == ["s"]
    assert engine.pool.visible_keys() == []
    engine.scheduler.arrived(sequence, [7])
    assert engine.pool.visible_keys() == sequence.full_block_keys()
    assert engine.pool.ledger(1e9).overdue == []
    assert engine.pool.ledger(0.0).holds[0].kind == HoldKind.COMPUTE.value
