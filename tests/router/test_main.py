"""The router as a process: it says what is missing, streams, drains on the first signal and ends on the second."""

from __future__ import annotations

import asyncio
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
import typer

from pdserve.errors import ConfigError
from router.__main__ import main
from router.bench.stub_worker import Fabric, StubSpec, StubWorker
from router.main import RouterConfig, listen
from tests.support.stub_cluster import MIXED

STARTED_S = 60.0
BODY = {"model": "SmolLM2-135M-Instruct", "prompt": [1, 2, 3], "max_tokens": 40, "ignore_eos": True}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


class RouterProcess:
    def __init__(
        self, process: asyncio.subprocess.Process, client: httpx.AsyncClient, worker_address: str, own_url: str
    ) -> None:
        self.process = process
        self.client = client
        self.worker_address = worker_address
        self.own_url = own_url

    async def answers(self, status: int) -> httpx.Response:
        """The first /readyz with this status."""
        deadline_s = time.monotonic() + STARTED_S
        while True:
            try:
                response = await self.client.get("/readyz")
            except httpx.TransportError:
                response = None
            if response is not None and response.status_code == status:
                return response
            assert self.process.returncode is None, "the router ended"
            assert time.monotonic() < deadline_s
            await asyncio.sleep(0.05)

    async def ended(self) -> int:
        async with asyncio.timeout(10):
            return await self.process.wait()


@pytest.fixture
async def router(default_model: Path) -> AsyncIterator[RouterProcess]:
    """Knows one worker address, where nobody listens yet; `--drain-s` is 5."""
    port, own_port, worker_address = free_port(), free_port(), f"127.0.0.1:{free_port()}"
    arguments = ["--port", str(port), "--model", str(default_model), "--worker", worker_address, "--drain-s", "5"]
    arguments += ["--reuse-port", "--own-port", str(own_port)]
    process = await asyncio.create_subprocess_exec(sys.executable, "-m", "router", *arguments)
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=20) as client:
        yield RouterProcess(process, client, worker_address, f"http://127.0.0.1:{own_port}")
    if process.returncode is None:
        process.kill()
        await process.wait()


@pytest.fixture
async def worker() -> AsyncIterator[StubWorker]:
    worker = StubWorker(StubSpec("m0", MIXED, token_s=0.03, model=BODY["model"]), Fabric())
    yield worker
    await worker.stop()


async def test_not_ready_says_what_is_missing_and_a_drained_stream_ends_whole(
    router: RouterProcess, worker: StubWorker
) -> None:
    missing = (await router.answers(503)).json()
    assert (missing["status"], missing["reason"]) == ("not ready", "no worker has joined")
    assert [entry["address"] for entry in missing["workers"]] == [router.worker_address]
    assert (await router.client.post("/v1/completions", json=BODY)).status_code == 503

    await worker.start(router.worker_address)
    await router.answers(200)
    assert (await router.client.get("/workers")).json()["workers"][0]["worker_id"] == "m0"
    metrics = (await router.client.get("/metrics")).text
    assert 'pdserve_router_workers{role="mixed",state="ready"} 1.0' in metrics
    assert (await router.client.get(f"{router.own_url}/readyz")).status_code == 200

    async with router.client.stream("POST", "/v1/completions", json=BODY | {"stream": True}) as response:
        lines = response.aiter_lines()
        await anext(lines)
        router.process.send_signal(signal.SIGTERM)
        late = [line async for line in lines if line]
    assert late[-1] == "data: [DONE]"
    assert await router.ended() == 0


async def test_a_second_signal_ends_what_still_streams(router: RouterProcess, worker: StubWorker) -> None:
    await worker.start(router.worker_address)
    await router.answers(200)
    body = BODY | {"stream": True, "max_tokens": 2000}
    async with router.client.stream("POST", "/v1/completions", json=body) as response:
        lines = response.aiter_lines()
        await anext(lines)
        router.process.send_signal(signal.SIGTERM)
        refused = await router.answers(503)
        assert refused.json()["draining"]
        began_s = time.monotonic()
        router.process.send_signal(signal.SIGTERM)
        late = [line async for line in lines if line]
    assert late[-1] != "data: [DONE]"
    assert await router.ended() == 0
    assert time.monotonic() - began_s < 4.0
    assert len(worker.aborts) <= 1


def test_routers_share_a_port_only_if_all_say_so() -> None:
    with listen("127.0.0.1", 0, reuse_port=True) as first:
        port = first.getsockname()[1]
        with listen("127.0.0.1", port, reuse_port=True) as second:
            assert second.getsockname() == first.getsockname()
        with pytest.raises(ConfigError, match=str(port)):
            listen("127.0.0.1", port)


def test_what_up_has_no_option_for_reaches_its_router_through_the_environment() -> None:
    app = typer.Typer()
    app.command()(main)
    variables = {getattr(option, "envvar", None) for option in typer.main.get_command(app).params}
    assert {"PDSERVE_ADMISSION", "PDSERVE_AUTO_BALANCE", "PDSERVE_DECISION_LOG", "PDSERVE_SKIP_HANDOFFS"} <= variables


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"workers": ()}, "--redis URL, or --worker"),
        ({"redis_url": "redis://localhost"}, "--redis URL, or --worker"),
        ({"policy": "best"}, "there are cost, round_robin, random, direct"),
        ({"drain_s": -1.0}, "cannot be negative"),
    ],
)
def test_wrong_settings_are_one_clear_sentence(changes: dict[str, object], message: str) -> None:
    settings: dict[str, object] = {
        "model": Path("m"),
        "host": "127.0.0.1",
        "port": 0,
        "redis_url": None,
        "workers": ("a:1",),
        "namespace": "default",
        "policy": "cost",
        "drain_s": 2.0,
    }
    with pytest.raises(ConfigError, match=message):
        RouterConfig(**{**settings, **changes})  # type: ignore[arg-type]
