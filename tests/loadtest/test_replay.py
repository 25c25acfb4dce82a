"""Traces are read as they are published, and replayed at the rate and the lengths that are asked for."""

from __future__ import annotations

import gzip
import itertools
import json
from pathlib import Path

import pytest

from loadtest.replay import Replay
from loadtest.session import Session
from pdserve.trace import AGENTIC_BLOCK_TOKENS, MOONCAKE_GRID_S, Row, Trace, read_trace

PUBLIC = Path(__file__).parents[3] / "shared" / "traces"


def mooncake_line(at_ms: int, blocks: list[int], length: int) -> str:
    return json.dumps({"timestamp": at_ms, "input_length": length, "output_length": 7, "hash_ids": blocks}) + "\n"


def first(replay: Replay, count: int, rate_rps: float = 2.0, seed: int = 0) -> list[Session]:
    return list(itertools.islice(replay.sessions(rate_rps, seed), count))


def prompt_of(session: Session) -> tuple[int, ...]:
    prompt = session.turns[0].prompt
    assert not isinstance(prompt, str)
    return prompt


def test_mooncake_rows(tmp_path: Path) -> None:
    path = tmp_path / "some.jsonl"
    path.write_text(mooncake_line(6_000, [0, 1], 700) + mooncake_line(9_000, [0, 2], 600))
    trace = read_trace(path)
    assert trace.rows == (Row(0.0, 700, 7, (0, 1)), Row(3.0, 600, 7, (0, 2)))
    assert (trace.name, trace.grid_s) == ("some", MOONCAKE_GRID_S)
    assert read_trace(path, 1).rows == trace.rows[:1]


def test_azure_rows_compressed(tmp_path: Path) -> None:
    path = tmp_path / "azure.csv.gz"
    lines = (
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.9951690,3,9"
    )
    path.write_bytes(gzip.compress(lines.encode()))
    trace = read_trace(path)
    assert [(row.prompt_tokens, row.output_tokens) for row in trace.rows] == [(374, 44), (3, 9)]
    assert trace.rows[1].at_s == pytest.approx(4.314579, abs=1e-5)
    assert trace.grid_s == 0.0


def test_agentic_rows_share_what_came_before_in_their_session(tmp_path: Path) -> None:
    path = tmp_path / "agents.jsonl"
    rows: list[dict[str, object]] = [
        {"s": 1, "t": 0.0, "in": 200, "out": 5, "p": 0, "h": [[1, 3]]},
        {"s": 1, "t": 9.0, "in": 270, "out": 6, "p": 2, "h": [[7, 1], [9, 1]]},
        {"s": 1, "a": "sub", "t": 3.0, "in": 64, "out": 7, "p": 0, "h": [[1, 1]]},
        {"s": 2, "t": 0.0, "in": 64, "out": 8, "p": 0, "h": [[1, 1]]},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    trace = read_trace(path)
    assert trace.block_tokens == AGENTIC_BLOCK_TOKENS
    by_output = {row.output_tokens: row for row in trace.rows}
    one, two, sub, other = (by_output[tokens] for tokens in (5, 6, 7, 8))
    assert len(one.blocks) == 3
    assert two.blocks[:2] == one.blocks[:2]
    assert not set(two.blocks[2:]) & set(one.blocks)
    assert sub.blocks == one.blocks[:1]
    assert other.blocks != one.blocks[:1]
    assert two.at_s - one.at_s == pytest.approx(9.0)


@pytest.mark.parametrize("text", ["", "not a trace\n", '{"timestamp": 1}\n', "[1]\n", "TIMESTAMP,A\nnow,1\n"])
def test_no_trace_is_a_value_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "file.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"no trace|no rows"):
        read_trace(path)


@pytest.mark.parametrize("rate_rps", [0.5, 40.0])
def test_time_runs_so_that_the_rate_is_met(rate_rps: float) -> None:
    rows = tuple(Row(3.0 * (number // 10), 100, 5) for number in range(200))
    sessions = first(Replay(Trace("t", rows, grid_s=3.0)), 1_000, rate_rps)
    assert 1_000 / sessions[-1].at_s == pytest.approx(rate_rps, rel=0.05)
    assert [s.at_s for s in sessions] == sorted(s.at_s for s in sessions)


def test_times_on_a_grid_are_spread_over_its_step() -> None:
    rows = tuple(Row(0.0, 100, 5) for _ in range(30))
    trace = Trace("t", rows, grid_s=3.0)
    at_s = [session.at_s for session in first(Replay(trace), 30, rate_rps=trace.rate_rps)]
    assert len(set(at_s)) == 30
    assert 0.0 <= min(at_s) < 0.5
    assert 2.5 < max(at_s) <= 3.0


def test_scaling_keeps_prefixes_and_lengths_in_proportion() -> None:
    rows = (Row(0.0, 1024 + 200, 100, (0, 1, 2)), Row(1.0, 1024 + 400, 100, (0, 1, 3)), Row(2.0, 300, 100, (9,)))
    one, two, other = map(prompt_of, first(Replay(Trace("t", rows), length_scale=0.125), 3))
    assert (len(one), len(two), len(other)) == (153, 178, 38)
    assert one[:128] == two[:128]
    assert one[128:] != two[128 : len(one)]
    assert other != one[: len(other)]


def test_blocks_of_less_than_a_token_keep_their_share() -> None:
    rows = (Row(0.0, 1000, 1, tuple(range(10))), Row(1.0, 1000, 1, (*range(5), *range(20, 25))))
    trace = Trace("t", rows, block_tokens=100)
    one, two = map(prompt_of, first(Replay(trace, length_scale=0.025), 2))
    assert len(one) == len(two) == 25
    assert one[:12] == two[:12]
    assert one[12:] != two[12:]


def test_a_second_lap_and_another_seed_have_prompts_of_their_own() -> None:
    replay = Replay(Trace("t", (Row(0.0, 600, 5, (0, 1)),), grid_s=1.0), length_scale=0.1)
    prompts = [*map(prompt_of, first(replay, 3)), *map(prompt_of, first(replay, 3, seed=1))]
    assert len(set(prompts)) == 6


def test_what_is_too_long_is_cut_and_nothing_is_empty() -> None:
    rows = (Row(0.0, 90_000, 900, tuple(range(176))), Row(1.0, 1, 1))
    long, short = first(Replay(Trace("t", rows), 0.5, max_prompt_tokens=64, max_output_tokens=16), 2)
    assert (len(prompt_of(long)), long.turns[0].output_tokens) == (64, 16)
    assert (len(prompt_of(short)), short.turns[0].output_tokens) == (1, 1)


@pytest.mark.parametrize(
    ("name", "length_scale"),
    [
        ("conversation_trace.jsonl.gz", 0.05),
        ("AzureLLMInferenceTrace_conv.csv.gz", 0.05),
        ("weka_agentic_compact.jsonl.gz", 0.005),
    ],
)
def test_public_traces_replay(name: str, length_scale: float) -> None:
    if not (PUBLIC / name).exists():
        pytest.skip(f"{PUBLIC / name} is not there")
    sessions = first(Replay(read_trace(PUBLIC / name, 200), length_scale=length_scale), 400, rate_rps=3.0)
    assert 400 / sessions[-1].at_s == pytest.approx(3.0, rel=0.1)
    assert 5 < sum(len(prompt_of(session)) for session in sessions) / 400 < 1_000
