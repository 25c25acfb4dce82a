"""What a router adds over HTTP, in front of stubs that answer at once: this one, and others whose programs are given.

Everything runs on this machine, so client, router and stub share its cores: compare the columns of one run. The others
are proxies in front of an HTTP stub; this router is the server itself, with a stub worker behind it over gRPC, and
tokenises the prompt.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import sys
import time
import urllib.request
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

PROMPT = "The quick brown fox jumps over the lazy dog, and then it sleeps."
RATES = (100, 500)  # requests/s
STREAM_TOKENS = 256
_STREAMS = 256
_STREAMS_AT_ONCE = 64


async def measure_http(model: Path, name: str, peers: Path | None) -> dict[str, Any]:
    """
    Args:
        name: of the model in `model`, as it is served.
        peers: a folder with the programs sglang-router and vllm-router, or one of them.
    """
    found: dict[str, Any] = {}
    async with _started("router.bench.http_stub") as stub:
        found["stub_alone"] = await _measure(stub, "stub")
        for peer, command in _peers(peers, stub).items():
            port = _free_port()
            async with _process(*command, "--port", str(port)) as (process, _):
                await _ready(port)
                found[peer] = await _measure(f"127.0.0.1:{port}", "stub", process.pid)
    for label, processes in (("pdserve", 1), ("pdserve_2_processes", 2)):
        async with _started("router.bench.stub_worker") as worker:
            if processes == 1:
                by_protocol = {f"at_{rate}_per_s": await _ask_worker(worker, rate) for rate in RATES}
            async with _routers(model, worker, processes) as (port, pids):
                found[label] = await _measure(f"127.0.0.1:{port}", name, *pids)
    alone = found["stub_alone"]
    for each in found.values():
        for rate in RATES:
            at, base = each[f"at_{rate}_per_s"], alone[f"at_{rate}_per_s"]
            at["added_p50_us"], at["added_p99_us"] = at["p50_us"] - base["p50_us"], at["p99_us"] - base["p99_us"]
    found["stub_worker_alone"] = by_protocol
    return found


@contextlib.asynccontextmanager
async def _routers(model: Path, worker: str, processes: int) -> AsyncIterator[tuple[int, list[int]]]:
    """So many on one port; with their process ids."""
    port = _free_port()
    options = ("--model", str(model), "--worker", worker, "--port", str(port), "--reuse-port", "--own-port")
    async with contextlib.AsyncExitStack() as running:
        pids: list[int] = []
        for _ in range(processes):
            own = _free_port()
            process, _ = await running.enter_async_context(_process(sys.executable, "-m", "router", *options, str(own)))
            pids.append(process.pid)
            await _ready(own)
        yield port, pids


def _peers(folder: Path | None, stub: str) -> dict[str, tuple[str, ...]]:
    """Those that are there, with their arguments."""
    if folder is None:
        return {}
    arguments = ("--worker-urls", f"http://{stub}", "--policy", "round_robin", "--host", "127.0.0.1")
    commands = {"sglang-router": ("launch", *arguments), "vllm-router": arguments}
    return {
        name: (str(folder / name), *rest, "--prometheus-port", str(_free_port()), "--log-level", "error")
        for name, rest in commands.items()
        if (folder / name).exists()
    }


async def _measure(address: str, model: str, *pids: int) -> dict[str, Any]:
    """`pids`: of the router, whose CPU time is measured too: client and stub share the cores with it."""
    fields = {"model": model, "prompt": PROMPT, "temperature": 0}
    whole = json.dumps({**fields, "max_tokens": 1})
    stream = json.dumps({**fields, "max_tokens": STREAM_TOKENS, "stream": True, "ignore_eos": True})
    found: dict[str, Any] = {}
    for rate in RATES:
        options = ("--requests", str(4 * rate), "--rate", str(rate))
        found[f"at_{rate}_per_s"] = _latency(await _load(address, whole, *options))
    before_s = _cpu_s(pids)
    requests = await _load(address, whole, "--requests", "1600")
    between_s = _cpu_s(pids)
    streams = await _load(address, stream, "--requests", str(_STREAMS), "--connections", str(_STREAMS_AT_ONCE))
    after_s = _cpu_s(pids)
    found["requests_per_s"] = requests["requests_per_s"]
    found["streamed_tokens_per_s"] = round(streams["requests_per_s"] * STREAM_TOKENS)
    if pids:
        found["requests_per_cpu_s"] = round(1600 / (between_s - before_s))
        found["streamed_tokens_per_cpu_s"] = round(_STREAMS * STREAM_TOKENS / (after_s - between_s))
    return found


def _latency(measured: dict[str, float]) -> dict[str, float]:
    return {name: measured[name] for name in ("p50_us", "p99_us", "refused")}


def _cpu_s(pids: Sequence[int]) -> float:
    """User and system time of these processes. Linux."""
    ticks = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


async def _load(address: str, body: str, *options: str) -> dict[str, float]:
    return await _answer("router.bench.http_load", address, body, *options)


async def _ask_worker(address: str, rate: int) -> dict[str, float]:
    """The stub worker without a router: what is added to it is the router's, and HTTP's."""
    return await _answer("router.bench.session_load", address, "--requests", str(4 * rate), "--rate", str(rate))


async def _answer(module: str, address: str, *options: str) -> dict[str, float]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", module, address, *options), stdout=asyncio.subprocess.PIPE
    )
    output, _ = await process.communicate()
    if process.returncode:
        raise RuntimeError(f"the load on {address} failed")
    answer: dict[str, float] = json.loads(output)
    return answer


@contextlib.asynccontextmanager
async def _started(module: str) -> AsyncIterator[str]:
    """The address that a stub prints."""
    async with _process(sys.executable, "-m", module, says_address=True) as (_, address):
        yield address


@contextlib.asynccontextmanager
async def _process(*command: str, says_address: bool = False) -> AsyncIterator[tuple[asyncio.subprocess.Process, str]]:
    quiet = asyncio.subprocess.DEVNULL
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE if says_address else quiet, stderr=quiet
    )
    try:
        address = ""
        if process.stdout is not None:
            address = (await asyncio.wait_for(process.stdout.readline(), 30)).decode().strip()
        yield process, address
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        try:
            await asyncio.wait_for(process.wait(), 10)
        except TimeoutError:
            process.kill()
            await process.wait()


async def _ready(port: int) -> None:
    """Once a request succeeds at one of the usual places."""
    deadline_s = time.monotonic() + 60
    while time.monotonic() < deadline_s:
        for path in ("readyz", "health"):
            with contextlib.suppress(OSError):
                await asyncio.to_thread(urllib.request.urlopen, f"http://127.0.0.1:{port}/{path}", None, 2)
                return
        await asyncio.sleep(0.2)
    raise TimeoutError(f"nothing is ready at port {port}")


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
        return port
