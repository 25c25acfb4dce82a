"""An audit passes only if every worker answers with a ledger that sums to its pool."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Protocol

import pytest
from redis import Redis
from typer.testing import CliRunner

from pdserve.cli import app
from pdserve.cli.ledger import STATES, audit
from pdserve.discovery import Endpoint, members_key
from pdserve.errors import ConfigError
from pdserve.launch.folders import RunFolder
from pdserve.launch.redis_server import await_answer, server_binary, server_command, server_url
from pdserve.launch.service import Service


class Server(Protocol):
    url: str
    address: str
    pages: dict[str, Any]


def ledger(worker: str = "prefill-0", **changes: Any) -> dict[str, Any]:
    by_state = {"free": 5, "cached": 1, "held": 2, "sending": 0, "receiving": 0, "quarantined": 0}
    holds = [
        {"owner": "r1", "kind": "sequence", "blocks": 1, "age_s": 0.5, "expires_in_s": None},
        {"owner": "r2", "kind": "ticket", "blocks": 1, "age_s": 2.5, "expires_in_s": 7.5},
    ]
    whole = {"worker_id": worker, "total_blocks": 8, "by_state": by_state, "holds": holds, "sums": True, "idle": False}
    return {**whole, **changes}


def test_a_whole_ledger() -> None:
    one = audit("h:1", ledger())
    assert one.whole
    assert (one.worker, one.total_blocks, one.holds, one.oldest_hold_s) == ("prefill-0", 8, 2, 2.5)


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (ledger(total_blocks=9), "8 blocks counted, 9 in the pool"),
        (ledger(sums=False), "does not sum"),
        (ledger(by_state={**ledger()["by_state"], "lost": 1}), "unknown states: lost"),
        (ledger(by_state=dict.fromkeys(STATES[:-1], 1)), "malformed"),
        (ledger(total_blocks="8"), "malformed"),
        (ledger(total_blocks=-1), "malformed"),
        (ledger(holds=[{}]), "malformed"),
        ([], "malformed"),
        (None, "malformed"),
    ],
)
def test_what_is_not_whole(value: Any, problem: str) -> None:
    one = audit("h:1", value)
    assert not one.whole
    assert problem in one.problem


def test_named_workers(server: Server, other_server: Server) -> None:
    server.pages["/ledger"] = ledger()
    other_server.pages["/ledger"] = ledger("decode-0")
    arguments = ["kv", "audit", "--worker", server.address, "--worker", other_server.address]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0
    assert "prefill-0" in result.stdout
    assert "decode-0" in result.stdout
    other_server.pages["/ledger"] = ledger("decode-0", total_blocks=7)
    listed = CliRunner().invoke(app, [*arguments, "--json"])
    assert listed.exit_code == 1
    assert [one["whole"] for one in json.loads(listed.stdout)] == [True, False]


@pytest.mark.parametrize("page", [503, "text", {}])
def test_a_worker_without_a_ledger_fails_the_audit(server: Server, page: Any) -> None:
    server.pages["/ledger"] = page
    result = CliRunner().invoke(app, ["kv", "audit", "--worker", server.address])
    assert result.exit_code == 1


def test_a_worker_that_is_not_there_fails_the_audit() -> None:
    result = CliRunner().invoke(app, ["kv", "audit", "--json", "--worker", "127.0.0.1:1"])
    assert result.exit_code == 1
    assert json.loads(result.stdout)[0]["problem"].startswith("unreachable")


def test_workers_of_a_router(server: Server, other_server: Server) -> None:
    server.pages["/ledger"] = ledger()
    other_server.pages["/workers"] = {"workers": [{"worker_id": "prefill-0", "admin_address": server.address}]}
    assert CliRunner().invoke(app, ["kv", "audit", "--url", other_server.url]).exit_code == 0
    assert CliRunner(env={"PDSERVE_URL": other_server.url}).invoke(app, ["kv", "audit"]).exit_code == 0
    other_server.pages["/workers"] = 404
    result = CliRunner().invoke(app, ["kv", "audit", "--url", other_server.url])
    assert isinstance(result.exception, ConfigError)


@pytest.fixture
async def redis_url() -> AsyncIterator[str]:
    with RunFolder(Path("/tmp")) as folder:
        service = Service(server_command(server_binary(), folder), folder, await_answer, 20.0)
        await service.start(lambda text, fraction: None)
        yield server_url(folder)
        await service.stop(grace_s=3.0)


async def test_workers_in_redis(server: Server, redis_url: str) -> None:
    server.pages["/ledger"] = ledger()
    endpoint = Endpoint("ns", "worker", "prefill-0", "127.0.0.1:1", 5, "prefill", admin_address=server.address)
    with Redis.from_url(redis_url) as client:
        client.set(endpoint.record_key, endpoint.to_json())
        client.sadd(members_key("ns", "worker"), "prefill-0")
    arguments = ["kv", "audit", "--redis", redis_url, "--namespace"]
    found = await asyncio.to_thread(CliRunner().invoke, app, [*arguments, "ns"])
    assert found.exit_code == 0, found.output
    none = await asyncio.to_thread(CliRunner().invoke, app, [*arguments, "other"])
    assert isinstance(none.exception, ConfigError)
