"""Workloads ask what they say: exact lengths, shared heads, conversations that carry their answers."""

from __future__ import annotations

import itertools

import pytest

from loadtest.session import Session, fitted, request_of
from loadtest.workload import Chat, ShareGpt, Synthetic, Workload

WORKLOADS = [Synthetic(32, 8), Synthetic(32, 8, cv=3.0, shared_tokens=20), ShareGpt(), Chat(turns=3)]


def first(workload: Workload, count: int, rate_rps: float = 2.0, seed: int = 0) -> list[Session]:
    return list(itertools.islice(workload.sessions(rate_rps, seed), count))


@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda workload: workload.name)
def test_a_seed_decides_everything_and_another_shares_no_prompt(workload: Workload) -> None:
    assert first(workload, 20) == first(workload, 20)
    prompts = {turn.prompt for session in first(workload, 20) for turn in session.turns}
    others = {turn.prompt for session in first(workload, 20, seed=1) for turn in session.turns}
    assert not prompts & others


@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda workload: workload.name)
def test_the_rate_counts_requests(workload: Workload) -> None:
    sessions = first(workload, 3_000, rate_rps=6.0)
    assert [s.at_s for s in sessions] == sorted(s.at_s for s in sessions)
    assert sum(len(s.turns) for s in sessions) / sessions[-1].at_s == pytest.approx(6.0, rel=0.15)


@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda workload: workload.name)
def test_a_short_window_has_the_rate_it_was_given(workload: Workload) -> None:
    sessions = fitted(workload.sessions(3.0, 5), 3.0, 10.0)
    requests = sum(len(session.turns) for session in sessions)
    assert 30 <= requests < 30 + len(sessions[-1].turns)
    assert 0.0 < sessions[0].at_s < sessions[-1].at_s < 10.0


def test_lengths_as_those_of_conversations() -> None:
    """The means that are given, less what is cut; short ones are common, and none is longer than a model takes."""
    turns = [session.turns[0] for session in first(ShareGpt(), 5_000)]
    prompts, outputs = [len(turn.prompt) for turn in turns], [turn.output_tokens for turn in turns]
    assert 140 < sum(prompts) / len(prompts) < 165
    assert 270 < sum(outputs) / len(outputs) < 340
    for lengths in (prompts, outputs):
        assert max(lengths) == 1000
        assert 4 <= min(lengths) < 20


def test_shared_head_and_own_tail() -> None:
    prompts = [session.turns[0].prompt for session in first(Synthetic(32, 8, shared_tokens=20), 50)]
    assert {len(prompt) for prompt in prompts} == {32}
    assert len({prompt[:20] for prompt in prompts}) == 1
    assert len({prompt[20:] for prompt in prompts}) == 50


@pytest.mark.parametrize(("prompt", "output", "shared"), [(8, 4, 8), (8, 0, 0), (8, 4, -1)])
def test_impossible_lengths_are_refused(prompt: int, output: int, shared: int) -> None:
    with pytest.raises(ValueError, match="tokens of its own"):
        Synthetic(prompt, output, shared_tokens=shared)


def test_a_conversation_carries_the_answers_before() -> None:
    session = first(Chat(turns=3), 1)[0]
    request = request_of(session, 2, ["one", "two"])
    roles = [message["role"] for message in request.body["messages"]]
    assert roles == ["system", "user", "assistant", "user", "assistant", "user"]
    contents = [message["content"] for message in request.body["messages"]]
    assert contents == [
        session.system,
        session.turns[0].prompt,
        "one",
        session.turns[1].prompt,
        "two",
        session.turns[2].prompt,
    ]
    assert request.path == "/chat/completions"
    assert request.body["max_tokens"] == Chat().output_tokens


def test_conversations_share_the_system_message_and_think_between_turns() -> None:
    sessions = first(Chat(turns=3), 10)
    assert len({session.system for session in sessions}) == 1
    assert all(session.turns[0].think_s == 0 for session in sessions)
    assert all(turn.think_s > 0 for session in sessions for turn in session.turns[1:])
