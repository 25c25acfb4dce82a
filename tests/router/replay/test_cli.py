"""`pdserve replay`: a table or JSON, and one clear sentence for what cannot be replayed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from router.replay.__main__ import main

app = typer.Typer()
app.command()(main)


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, list(arguments))
    return result.exit_code, result.output


@pytest.fixture
def trace(tmp_path: Path) -> str:
    rows = [
        {"timestamp": 100 * number, "input_length": 1024, "output_length": 5, "hash_ids": [0, number // 2]}
        for number in range(40)
    ]
    path = tmp_path / "small.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_json_has_an_outcome_a_policy(trace: str) -> None:
    code, output = run(trace, "--policy", "cost, round_robin", "--workers", "3", "--json")
    assert code == 0
    outcomes = json.loads(output)
    assert [each["policy"] for each in outcomes] == ["cost", "round_robin"]
    assert all(each["requests"] == 40 and each["failed"] == 0 for each in outcomes)
    assert outcomes[0]["hit_ratio"] > outcomes[1]["hit_ratio"]


def test_a_table_names_every_policy(trace: str) -> None:
    code, output = run(trace, "--policy", "least_load,prefix_only", "--max-requests", "10", "--outage", "1:0:1")
    assert code == 0
    assert "least_load" in output
    assert "prefix_only" in output


def test_a_decision_log_is_a_trace(tmp_path: Path) -> None:
    lines = [
        {"received_unix_s": 10.0, "prompt_tokens": 100, "actual": {"output_tokens": 3}},
        {"received_unix_s": 11.0, "prompt_tokens": 50, "actual": None},
    ]
    path = tmp_path / "decisions.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    code, output = run(str(path), "--json")
    assert code == 0
    assert json.loads(output)[0]["good_ratio"] == 1.0


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "cannot be read"),
        ("", "has no rows"),
        ("nonsense\n", "line 1"),
        ('{"timestamp": 1, "input_length": 5, "output_length": 1, "hash_ids": [1]}\n{"timestamp": 2}\n', "line 2"),
        ('{"timestamp": 1, "input_length": -5, "output_length": 1, "hash_ids": [1]}\n', "out of range"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\nyesterday,1,2\n", "line 2"),
    ],
)
def test_a_bad_file_is_named_with_its_line(tmp_path: Path, text: str | None, says: str) -> None:
    path = tmp_path / "bad.jsonl"
    if text is not None:
        path.write_text(text)
    code, output = run(str(path))
    assert code == 1
    assert "bad.jsonl" in output
    assert says in output


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--policy", "cost,fastest"), "No policy is named fastest"),
        (("--policy", ","), "No policy"),
        (("--outage", "1:2"), "WORKER:FROM_S:UNTIL_S"),
        (("--outage", "99:1:2"), "workers are 0 to 15"),
    ],
)
def test_a_bad_option_is_explained(trace: str, options: tuple[str, ...], says: str) -> None:
    code, output = run(trace, *options)
    assert code == 1
    assert says in output
