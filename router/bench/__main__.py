"""`python -m router.bench`: a decision, events, a request and a token, alone and over HTTP beside other routers. JSON.

For `below_http` the router runs whole in this process, below HTTP's sockets: bytes of a body in, server-sent events
out. Its worker is a stub in another process, so this process's CPU time is the router's own. The per-token figure is
the slope between answers of one token and long ones. Parts of the request's share are timed alone beside it.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
import uvloop
from starlette.types import ASGIApp

from kvstore.keys import block_keys, root_key
from pdserve.launch.folders import cache_folder
from pdserve.models.default_model import ensure_default_model
from router.bench.decide import measure_decision, measure_events
from router.bench.http_path import measure_http
from router.main import Router, RouterConfig, load_model

PROMPT_TOKENS = 512
LONG_ANSWER_TOKENS = 256
BLOCK_SIZE = 16
CONCURRENCY = 16


def main(
    model: Annotated[Path | None, typer.Option(help="Its tokeniser is used; none: the default model.")] = None,
    requests: Annotated[int, typer.Option(help="Requests of each kind.")] = 200,
    peers: Annotated[Path | None, typer.Option(help="Folder with sglang-router and vllm-router.")] = None,
    dynamo: Annotated[Path | None, typer.Option(help="Python that has ai-dynamo-runtime.")] = None,
) -> None:
    """Measure and print JSON."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        folder = model or ensure_default_model(cache_folder(), lambda text, share: None)
        found = {
            "decision": measure_decision(),
            "dynamo": _dynamo(dynamo),
            "events": measure_events(),
            "below_http": runner.run(measure(folder, requests)),
            "http": runner.run(measure_http(folder, load_model(folder).name, peers)),
        }
        print(json.dumps(found, indent=2))


def _dynamo(python: Path | None) -> Any:
    if python is None:
        return None
    script = Path(__file__).with_name("dynamo_peer.py")
    return json.loads(subprocess.run([python, script], stdout=subprocess.PIPE, check=True).stdout)


async def measure(model: Path, requests: int) -> dict[str, Any]:
    worker = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "router.bench.stub_worker", stdout=asyncio.subprocess.PIPE
    )
    try:
        assert worker.stdout is not None
        address = (await asyncio.wait_for(worker.stdout.readline(), 30)).decode().strip()
        served = load_model(model)
        config = RouterConfig(model, "", 0, None, (address,), "default", "cost", 0.0)
        router = Router(config, served)
        router.start()
        while not router.fleet.ready:
            await router.fleet.wait_change(1.0)
        text = served.tokenizer.decode(list(range(1000, 1000 + PROMPT_TOKENS)))
        await _drive(router.app, _body(served.name, text, 1), requests)
        short_s, short_wall_s = await _drive(router.app, _body(served.name, text, 1), requests)
        long_s, long_wall_s = await _drive(router.app, _body(served.name, text, LONG_ANSWER_TOKENS), requests)
        await router.close()
    finally:
        worker.terminate()
        await worker.wait()
    tokens = requests * (LONG_ANSWER_TOKENS - 1)
    tokenised = served.tokenizer.encode(text, add_special=False)
    return {
        "prompt_tokens": len(tokenised),
        "cpu_us_per_request": round(short_s / requests * 1e6, 1),
        "cpu_us_per_token": round((long_s - short_s) / tokens * 1e6, 2),
        "requests_per_s": round(requests / short_wall_s, 1),
        "streamed_tokens_per_s": round(requests * LONG_ANSWER_TOKENS / long_wall_s),
        "tokenise_us": _time_us(lambda: served.tokenizer.encode(text, add_special=False)),
        "block_keys_us": _time_us(lambda: block_keys(root_key(b"x"), tokenised, BLOCK_SIZE)),
    }


def _body(model: str, text: str, max_tokens: int) -> bytes:
    fields = {"model": model, "prompt": text, "max_tokens": max_tokens, "stream": True, "ignore_eos": True}
    return json.dumps(fields).encode()


async def _drive(app: ASGIApp, body: bytes, requests: int) -> tuple[float, float]:
    """CPU and wall seconds for so many requests, `CONCURRENCY` at a time."""
    gate = asyncio.Semaphore(CONCURRENCY)

    async def one() -> None:
        async with gate:
            await _post(app, body)

    cpu_s, wall_s = time.process_time(), time.perf_counter()
    await asyncio.gather(*(one() for _ in range(requests)))
    return time.process_time() - cpu_s, time.perf_counter() - wall_s


async def _post(app: ASGIApp, body: bytes) -> None:
    scope = {
        "type": "http",
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": "/v1/completions",
        "raw_path": b"/v1/completions",
        "root_path": "",
        "query_string": b"",
        "headers": [(b"host", b"bench"), (b"content-type", b"application/json")],
    }
    received = iter([{"type": "http.request", "body": body, "more_body": False}])
    ended = asyncio.Event()
    status = 0
    last = b""

    async def receive() -> dict[str, Any]:
        message = next(received, None)
        if message is None:
            await ended.wait()
            return {"type": "http.disconnect"}
        return message

    async def send(message: Any) -> None:
        nonlocal status, last
        status = message.get("status", status)
        last = message.get("body") or last

    await app(scope, receive, send)
    ended.set()
    if status != 200 or not last.endswith(b"[DONE]\n\n"):
        raise RuntimeError(f"a request failed with status {status}: {last[-200:]!r}")


def _time_us(call: Callable[[], object], repeats: int = 200) -> float:
    """Median of single calls."""
    took: list[float] = []
    for _ in range(repeats):
        began_s = time.perf_counter()
        call()
        took.append(time.perf_counter() - began_s)
    return round(sorted(took)[repeats // 2] * 1e6, 1)


if __name__ == "__main__":
    typer.run(main)
