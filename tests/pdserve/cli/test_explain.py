"""`pdserve explain` shows the record that the router keeps, or says in one sentence why it cannot."""

from __future__ import annotations

import copy
import json
from typing import Any, Protocol

import pytest
from typer.testing import CliRunner

from pdserve.cli import app
from pdserve.errors import ConfigError


class Server(Protocol):
    url: str
    pages: dict[str, Any]


RECORD: dict[str, Any] = {
    "request_id": "cmpl-1",
    "prompt_tokens": 40,
    "slo": {"name": "standard"},
    "decisions": [
        {
            "phase": "prompt",
            "policy": "cost",
            "chosen": "p0",
            "runner_up": "p1",
            "hit_blocks": 2,
            "best_hit_blocks": 3,
            "fetched_blocks": 0,
            "reachable_blocks": 3,
            "why_not": "",
            "candidates": [
                {
                    "worker_id": name,
                    "cost_s": 0.012,
                    "terms_s": {"uncached": 0.012},
                    "hit_blocks": 2,
                    "fetch": {"blocks": 0, "tier": None, "seconds": 0.0},
                    "uncached_tokens": 8,
                    "compute_s": 0.012,
                    "move_bytes": 0,
                    "link": None,
                }
                for name in ("p0", "p1")
            ],
            "filtered": [{"worker_id": "d0", "reason": "role decode"}],
        }
    ],
    "predicted": {"ttft_s": 0.012, "tpot_s": 0.02},
    "actual": {"ttft_s": 0.034, "tpot_s": None, "ttft_stages_s": {"queue": 0.034}, "handoff_stages_s": {}},
    "end": "stop",
    "missed_by": "queue",
}


def test_for_people(server: Server) -> None:
    server.pages["/v1/requests/cmpl-1/explain"] = RECORD
    shown = CliRunner().invoke(app, ["explain", "cmpl-1", "--url", server.url])
    assert shown.exit_code == 0, shown.output
    for expected in ("p0 <", "p1 2nd", "not d0: role decode", "predicted 12.00 ms, was 34.00 ms", "by queue"):
        assert expected in shown.output


def test_names_and_terms_are_never_cut_off(server: Server) -> None:
    decision = copy.deepcopy(RECORD["decisions"][0])
    names = [f"prefill-{number}.machine.example.org" for number in range(2)]
    for candidate, name in zip(decision["candidates"], names, strict=True):
        candidate["worker_id"] = name
        candidate["terms_s"] = {f"term_{number}": 12.3456 for number in range(8)}
        candidate["fetch"] = {"blocks": 1000, "tier": "remote", "seconds": 0.25}
    server.pages["/v1/requests/x/explain"] = RECORD | {"decisions": [decision]}
    shown = CliRunner().invoke(app, ["explain", "x", "--url", server.url]).output
    for name in names:
        line = next(line for line in shown.splitlines() if name in line)
        assert line.count("12345.60") == 8
        assert "1000 blocks (remote), 250.00" in line


@pytest.mark.parametrize(
    ("reason", "refused", "said"),
    [
        (None, False, "admission: taken, TTFT 500.00 ms and TPOT 20.00 ms foreseen"),
        ("ttft", False, "admission: would have been refused (ttft), TTFT 500.00 ms"),
        ("tpot", True, "admission: refused (tpot), TTFT 500.00 ms"),
    ],
)
def test_what_admission_said(server: Server, reason: str | None, refused: bool, said: str) -> None:
    verdict = {"reason": reason, "refused": refused, "forecast": {"ttft_s": 0.5, "tpot_s": 0.02}}
    server.pages["/v1/requests/x/explain"] = RECORD | {"admission": verdict}
    assert said in CliRunner().invoke(app, ["explain", "x", "--url", server.url]).output


def test_the_copy_of_a_hot_prefix(server: Server) -> None:
    copied = {"worker_id": "p1", "blocks": 32, "num_bytes": 12_000_000, "load": 0.61}
    server.pages["/v1/requests/x/explain"] = RECORD | {"hot_prefix": copied}
    shown = CliRunner().invoke(app, ["explain", "x", "--url", server.url]).output
    assert "its prefix is hot (load 0.61): p1 was asked to load it, 32 blocks, 12.0 MB" in shown


def test_for_machines(server: Server) -> None:
    server.pages["/v1/requests/a%2Fb/explain"] = RECORD
    shown = CliRunner().invoke(app, ["explain", "a/b", "--url", server.url, "--json"])
    assert json.loads(shown.output) == RECORD


def test_an_unknown_request_and_a_router_that_is_away(server: Server) -> None:
    for url, reason in (
        (server.url, "cannot explain x: it answered with status 404"),
        ("http://127.0.0.1:1", "does not answer"),
    ):
        failed = CliRunner().invoke(app, ["explain", "x", "--url", url])
        assert isinstance(failed.exception, ConfigError)
        with pytest.raises(ConfigError, match=reason):
            raise failed.exception
