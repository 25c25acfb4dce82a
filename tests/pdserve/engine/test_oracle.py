"""The oracle model is worth having: one wrong byte in any block that a sequence reads changes what it says."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from pdserve.engine.engine import Engine
from pdserve.engine.sequence import Sequence
from tests.support.tiny_engine import BLOCK_SIZE, expected_of, make_sequence, output_of, run_to_end, step, tiny_engine

CASES = list(product((0, 3, 4, 9), (0, 1), (0, 1), (0, 1)))


def half_way() -> tuple[Engine, Sequence]:
    """A sequence of 10 tokens in three blocks that has 11 more to say."""
    engine = tiny_engine()
    sequence = make_sequence("s", range(10), max_tokens=12)
    engine.scheduler.add(sequence)
    step(engine)
    return engine, sequence


def test_untouched_sequence_says_what_it_must() -> None:
    engine, sequence = half_way()
    run_to_end(engine)
    assert output_of(sequence) == expected_of(sequence, engine)


@pytest.mark.parametrize(("position", "side", "layer", "head"), CASES)
def test_one_wrong_byte_is_seen(position: int, side: int, layer: int, head: int) -> None:
    engine, sequence = half_way()
    block, offset = divmod(position, BLOCK_SIZE)
    engine.runner.pool.view(torch.uint8)[sequence.block_ids[block], head, layer, side, offset, -1] ^= 1
    run_to_end(engine)
    assert output_of(sequence)[1:] != expected_of(sequence, engine)[1:]


def test_exchanged_foreign_and_missing_blocks_are_seen() -> None:
    for ids in ([1, 0, 2], [0, 0, 2], [0, 9, 2]):
        engine, sequence = half_way()
        table = sequence.block_ids[:3]
        sequence.block_ids[:] = type(table)("i", [table[i] if i < 3 else 15 for i in ids])
        run_to_end(engine)
        assert output_of(sequence) != expected_of(sequence, engine)
