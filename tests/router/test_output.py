"""Output tokens are accepted once and in order, whatever order they come in, and a reader gets exactly one end."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdserve.errors import WorkerFailed
from pdserve.protocol import worker_pb2 as pb
from pdserve.request import FinishReason
from router.generation import Tokens
from router.output import OutputBuffer, TokenOrder


def token(index: int) -> pb.TokenEvent:
    return pb.TokenEvent(index=index, token_id=100 + index)


@given(st.permutations(range(12)), st.lists(st.integers(0, 30)))
def test_any_order_with_duplicates_yields_each_token_once_in_order(order: list[int], extra: list[int]) -> None:
    tokens = TokenOrder(max_tokens=12, max_held=12)
    accepted = [event.index for index in [*order, *extra] for event in tokens.offer(token(index)) or ()]
    assert accepted == list(range(12))
    assert tokens.token_ids == [100 + index for index in range(12)]
    assert not tokens.gap


def test_duplicates_and_what_lies_out_of_bounds_are_rejected() -> None:
    tokens = TokenOrder(max_tokens=3, max_held=8)
    assert tokens.offer(token(0)) is not None
    assert tokens.offer(token(0)) is None
    assert tokens.offer(token(3)) is None
    assert tokens.offer(token(2)) == []
    assert tokens.offer(token(2)) is None
    assert tokens.gap


def test_no_more_than_the_limit_is_held() -> None:
    tokens = TokenOrder(max_tokens=100, max_held=2)
    assert [tokens.offer(token(index)) for index in (1, 2, 3)] == [[], [], None]


def test_a_new_attempt_forgets_what_was_held() -> None:
    tokens = TokenOrder(max_tokens=10, max_held=8)
    tokens.offer(token(1))
    tokens.restart()
    assert tokens.offer(token(0)) == [token(0)]
    assert tokens.token_ids == [100]


def test_an_end_without_a_token_waits_for_its_turn() -> None:
    tokens = TokenOrder(max_tokens=10, max_held=8)
    end = pb.TokenEvent(index=1, no_token=True, finish=pb.STOP)
    assert tokens.offer(end) == []
    assert tokens.offer(token(0)) == [token(0), end]
    assert tokens.token_ids == [100]


async def test_tokens_that_gathered_come_together_and_with_the_end() -> None:
    buffer = OutputBuffer()
    buffer.put(pb.TokenEvent(token_id=1))
    buffer.put(pb.TokenEvent(token_id=2))
    buffer.close(FinishReason.LENGTH)
    buffer.close(FinishReason.ABORT)
    assert await buffer.next() == Tokens((1, 2), FinishReason.LENGTH)
    with pytest.raises(StopAsyncIteration):
        await buffer.next()


async def test_an_error_comes_after_the_tokens_before_it() -> None:
    buffer = OutputBuffer()
    waiting = asyncio.create_task(buffer.next())
    await asyncio.sleep(0)
    buffer.put(pb.TokenEvent(token_id=1))
    buffer.close(WorkerFailed("gone"))
    assert await waiting == Tokens((1,), None)
    with pytest.raises(WorkerFailed):
        await buffer.next()
    with pytest.raises(StopAsyncIteration):
        await buffer.next()
