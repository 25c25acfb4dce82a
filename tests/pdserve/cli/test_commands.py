"""Each command hands its arguments on, ends with the right code, and says in one sentence what is wrong."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import pdserve
from pdserve.cli import app, forward
from pdserve.cli.bench import BENCHMARKS, available

ROOT = Path(__file__).resolve().parents[3]


class Became(Exception):
    """Stands for the new program: `os.execv` does not return."""


@pytest.fixture
def execv(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    calls: list[list[str]] = []

    def record(path: str, arguments: list[str]) -> None:
        assert path == sys.executable
        calls.append(arguments[1:])
        raise Became

    monkeypatch.setattr(os, "execv", record)
    return calls


@pytest.mark.parametrize("name", ["router", "worker", "store"])
@pytest.mark.parametrize(
    "arguments", [[], ["--help"], ["--port", "1", "--worker", "h:1", "--worker", "h:2"], ["a", "-x"]]
)
def test_single_processes_take_over_with_all_arguments(execv: list[list[str]], name: str, arguments: list[str]) -> None:
    result = CliRunner().invoke(app, [name, *arguments])
    assert isinstance(result.exception, Became)
    module = {"router": "router", "worker": "pdserve.worker", "store": "kvstore.store"}[name]
    assert execv == [["-m", module, *arguments]]


def test_bench_runs_the_module_of_a_name(execv: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BENCHMARKS, "some", ("json.tool", "a benchmark"))
    result = CliRunner().invoke(app, ["bench", "some", "--quick", "x"])
    assert isinstance(result.exception, Became)
    assert execv == [["-m", "json.tool", "--quick", "x"]]


def test_bench_lists_and_refuses_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BENCHMARKS, "absent", ("pdserve.nowhere.absent", "not installed"))
    assert "absent" not in available()
    listed = CliRunner().invoke(app, ["bench"])
    assert (listed.exit_code, [line.split()[0] for line in listed.stdout.splitlines()]) == (0, list(available()))
    refused = CliRunner().invoke(app, ["bench", "absent"])
    assert refused.exit_code == 2
    assert "absent" in refused.stderr


def test_version() -> None:
    assert CliRunner().invoke(app, ["version"]).stdout == f"{pdserve.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["up", "--prefill", "0"], "At least one worker"),
        (["up", "--mixed", "-1", "--prefill", "1"], "cannot be negative"),
        (["up", "--model", "/nowhere"], "/nowhere does not exist"),
        (["chat", "--url", "ftp://x"], "no http or https URL"),
        (["kv", "audit", "--worker", "h:1", "--url", "h:2"], "only one of --worker, --url and --redis"),
    ],
)
def test_what_the_user_can_mend_is_one_sentence(arguments: list[str], sentence: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pdserve.cli", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert sentence in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_forwarded_command_really_runs() -> None:
    code = "from pdserve.cli.forward import become; become('json.tool', ['--help'])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60, check=False
    )
    assert done.returncode == 0
    assert "json.tool" in done.stdout
    assert forward.FORWARD["add_help_option"] is False
