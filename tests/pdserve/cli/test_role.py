"""`pdserve role`: asks the router, waits until the worker has the role, and passes on why it cannot have it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pdserve.cli import app
from pdserve.errors import ConfigError


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["role", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def answers(server: Any, role: str, next_role: str | None) -> dict[str, Any]:
    entry = {"worker_id": "d0", "role": role, "next_role": next_role, "state": "ready"}
    server.stream = [json.dumps(entry).encode()]
    return entry


def test_it_returns_when_the_worker_has_the_role(server: Any, tmp_path: Path) -> None:
    answers(server, "decode", "prefill")
    server.pages["/v1/topology"] = {"workers": [{"worker_id": "d0", "role": "prefill", "next_role": None}]}
    key = tmp_path / "key"
    key.write_text("secret\n")
    shown = run("d0", "prefill", "--url", server.url, "--drain-s", "1", "--force", "--admin-key-file", str(key))
    assert shown == "d0: prefill\n"
    assert server.bodies == [{"role": "prefill", "drain_s": 1.0, "force": True}]
    assert {each["x-pdserve-admin-key"] for each in server.headers} == {"secret"}, "the topology is for operators too"


def test_without_waiting_it_says_what_is_coming(server: Any) -> None:
    entry = answers(server, "decode", "prefill")
    assert run("d0", "prefill", "--url", server.url, "--no-wait") == "d0: decode, becomes prefill\n"
    assert json.loads(run("d0", "prefill", "--url", server.url, "--no-wait", "--json")) == entry


def test_a_refusal_is_told_in_the_routers_words(server: Any) -> None:
    server.status = 409
    server.stream = [
        json.dumps({"error": {"message": "d0 is the last decode worker.", "code": "last_of_role"}}).encode()
    ]
    with pytest.raises(ConfigError, match=r"^d0 is the last decode worker\.$"):
        run("d0", "prefill", "--url", server.url)


def test_no_router_no_key() -> None:
    with pytest.raises(ConfigError, match="does not answer"):
        run("d0", "prefill", "--url", "http://127.0.0.1:1")
    with pytest.raises(ConfigError, match="admin key cannot be read"):
        run("d0", "prefill", "--admin-key-file", "/nowhere/key")
