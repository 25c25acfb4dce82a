"""Progress is visible with and without a terminal, and lines are whole in both."""

from __future__ import annotations

import io
import shlex
import time

import pytest
from rich.console import Console

from pdserve.launch.http_front import example_command
from pdserve.launch.steps import Steps


def shown(*, terminal: bool) -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    return Console(file=out, force_terminal=terminal, width=60, highlight=False, color_system=None), out


def test_plain_lines_without_a_terminal() -> None:
    console, out = shown(terminal=False)
    with Steps(console) as steps:
        steps.begin("model", "preparing")
        steps.done("model", "tiny")
        steps.begin("redis", "starting")
        steps.failed("redis", "No room.")
    lines = out.getvalue().splitlines()
    assert lines[0] == "  model      preparing"
    assert lines[1].startswith("✓ model      tiny  0.")
    assert lines[3].startswith("✗ redis      No room.  0.")


def test_a_long_step_reports_now_and_then_without_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    console, out = shown(terminal=False)
    now_s = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now_s)
    with Steps(console) as steps:
        steps.begin("model", "preparing")
        for step in range(120):
            now_s += 0.1
            steps.progress("model", "downloading", step / 120)
    assert out.getvalue().count("downloading") == 2  # in 12 s


def test_a_terminal_shows_live_progress() -> None:
    console, out = shown(terminal=True)
    with Steps(console) as steps:
        steps.begin("model", "preparing")
        steps.progress("model", "downloading [93 MB]", 0.5)  # no markup
        steps._live.refresh()
        steps.done("model", "tiny")
    assert "downloading [93 MB]" in out.getvalue()
    assert "✓ model" in out.getvalue()


def test_a_command_is_one_line_that_a_shell_reads() -> None:
    console, out = shown(terminal=False)
    Steps(console).say(example_command("http://127.0.0.1:8000", "it's [a] model"))
    assert out.getvalue().count("\n") == 1
    assert '"it\'s [a] model"' in shlex.split(out.getvalue())[-1]
