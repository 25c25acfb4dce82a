"""`python -m pdserve.bench.tiers`: TTFT of one long prompt, computed, and found in each tier.

Four mixed workers, one after the other asked for the same prompt, so that each pool starts without it:

    first ask of `a0` computes it, the second finds it in the pool (device)
    `a1` loads it from the store of its machine (host); `a2` likewise, after the host tier was emptied (disk)
    `b0` belongs to another store node, which fetches it from the first (remote), over shared memory or TCP

Each round has a prompt of its own; medians over the rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import grpc.aio

from kvstore.keys import block_keys, root_key
from kvstore.store import store_pb2 as pb
from kvstore.store.config import operator_socket
from kvstore.store.store_pb2_grpc import StoreOperatorStub
from kvstore.store.tier import Tier
from pdserve.bench.result import tell
from pdserve.launch.announce import Progress, await_ready
from pdserve.launch.child import Child, Command
from pdserve.launch.folders import cache_folder
from pdserve.launch.http_front import connect, get_json
from pdserve.launch.redis_server import await_answer, server_binary, server_command, server_url
from pdserve.launch.service import AwaitReady, Service
from pdserve.models.default_model import ensure_default_model

_READY_S = 180.0
_SAVED_S = 30.0
_HOST = "127.0.0.1"
_WORKERS = {"a0": "a", "a1": "a", "a2": "a", "b0": "b"}
_THREADS = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "UCX_WARN_UNUSED_ENV_VARS": "n"}


class Deployment:
    """Two store nodes, four workers and a router that obeys the header `x-pdserve-worker`. Enter before use."""

    def __init__(self, model: Path, folder: Path) -> None:
        self._model = model
        self._folder = folder
        self._services = AsyncExitStack()
        with socket.create_server((_HOST, 0)) as probe:
            self.port = probe.getsockname()[1]

    async def __aenter__(self) -> Deployment:
        redis = server_url(self._folder)
        await self._start(server_command(server_binary(), self._folder), await_answer)
        for node, host in (("a", _HOST), ("b", "127.0.0.2")):
            await self._run(
                f"store-{node}",
                "kvstore.store",
                ("--socket", self._socket(node), "--node-id", node, "--host", host, "--redis", redis),
                ("--host-bytes", "1GiB", "--disk-bytes", "4GiB", "--disk-path", str(self._folder / node)),
                ("--policy", "all"),
            )
        addresses = []
        for worker, node in _WORKERS.items():
            ready = await self._run(
                worker,
                "pdserve.worker",
                ("--role", "mixed", "--worker-id", worker, "--model", str(self._model)),
                ("--store", self._socket(node)),
            )
            addresses += ["--worker", ready["address"]]
        command = [sys.executable, "-m", "router", "--port", str(self.port), "--policy", "direct"]
        command += ["--model", str(self._model), *addresses]
        await self._start(Command("router", command, {}, announces=False), self._routes)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._services.aclose()

    def ask(self, worker: str, prompt: list[int]) -> dict[str, Any]:
        """The timeline extension of the answer."""
        connection = connect(f"http://{_HOST}:{self.port}", timeout_s=120.0)
        headers = {"Content-Type": "application/json", "x-pdserve-worker": worker, "x-pdserve-timeline": "1"}
        body = {"model": self._model.name, "prompt": prompt, "max_tokens": 1, "temperature": 0}
        connection.request("POST", "/v1/completions", json.dumps(body), headers)
        answer: dict[str, Any] = json.loads(connection.getresponse().read())
        connection.close()
        extension: dict[str, Any] = answer["x_pdserve"]
        return extension

    async def saved(self, keys: list[Any], tier: Tier) -> None:
        """Node a has these blocks in this tier."""
        async with _operator_channel(self._socket("a")) as channel:
            until_s = time.monotonic() + _SAVED_S
            while True:
                listed = await StoreOperatorStub(channel).List(pb.ListRequest())
                if set(keys) <= {block.key for block in listed.blocks if block.tier == tier}:
                    return
                if time.monotonic() > until_s:
                    raise SystemExit(f"the store did not take the prompt into its {tier.label} tier")
                await asyncio.sleep(0.02)

    async def evict_host(self, node: str) -> None:
        async with _operator_channel(self._socket(node)) as channel:
            await StoreOperatorStub(channel).Evict(pb.EvictRequest(all=True, tier=Tier.HOST))

    def _socket(self, node: str) -> str:
        return str(self._folder / f"{node}.sock")

    async def _run(self, name: str, module: str, *options: Iterable[str]) -> dict[str, Any]:
        arguments = [sys.executable, "-m", module, *(part for group in options for part in group)]
        return await self._start(Command(name, arguments, _THREADS, announces=True), _announced)

    async def _start(self, command: Command, ready: AwaitReady) -> dict[str, Any]:
        service = Service(command, self._folder, ready, _READY_S)
        self._services.push_async_callback(service.stop, 3.0)
        return await service.start(lambda text, fraction: None)

    async def _routes(self, child: Child, progress: Progress) -> dict[str, Any]:
        while True:
            try:
                topology = await asyncio.to_thread(get_json, f"http://{_HOST}:{self.port}", "/workers")
            except (OSError, ValueError):
                topology = {"workers": []}
            if [worker["state"] for worker in topology["workers"]] == ["ready"] * len(_WORKERS):
                return {}
            await asyncio.sleep(0.1)


def _operator_channel(socket_path: str) -> grpc.aio.Channel:
    return grpc.aio.insecure_channel(f"unix:{operator_socket(Path(socket_path))}")


async def _announced(child: Child, progress: Progress) -> dict[str, Any]:
    assert child.ready_pipe is not None
    return await await_ready(child.ready_pipe, progress)


async def measure(deployment: Deployment, num_tokens: int, rounds: int, fingerprint: bytes) -> dict[str, Any]:
    """Seconds to the first token by where the prompt was; each found tier is checked against what the answer says."""
    ttft_s: dict[str, list[float]] = {}
    rng = random.Random(1)

    async def ask(worker: str, prompt: list[int], where: str) -> None:
        extension = await asyncio.to_thread(deployment.ask, worker, prompt)
        found = extension["cached_tokens"] or {"computed": 0}
        if set(found) != {where}:
            raise SystemExit(f"the prompt was to be found in {where}, and came from {found}")
        ttft_s.setdefault(where, []).append(extension["ttft_s"])

    for _ in range(rounds + 1):  # the first one warms up
        prompt = [rng.randrange(100, 40_000) for _ in range(num_tokens)]
        keys = block_keys(root_key(fingerprint), prompt[:-1], 16)
        await ask("a0", prompt, "computed")
        await ask("a0", prompt, "device")
        await deployment.saved(keys, Tier.HOST)
        await ask("a1", prompt, "host")
        await ask("b0", prompt, "remote")
        await deployment.evict_host("a")
        await deployment.saved(keys, Tier.DISK)
        await ask("a2", prompt, "disk")
    medians = {where: statistics.median(times[1:]) for where, times in ttft_s.items()}
    order = ("computed", "device", "host", "disk", "remote")
    return {
        "prompt_tokens": num_tokens,
        "rounds": rounds,
        "ttft_s": {where: round(medians[where], 4) for where in order},
        "computed_over": {where: round(medians["computed"] / medians[where], 1) for where in order[1:]},
    }


async def _main(num_tokens: int, rounds: int) -> dict[str, Any]:
    model = ensure_default_model(cache_folder(), lambda text, share: None)
    with tempfile.TemporaryDirectory(prefix="pdserve-bench-") as folder:
        async with Deployment(model, Path(folder)) as deployment:
            async with _operator_channel(str(Path(folder) / "a.sock")) as channel:
                stat = await StoreOperatorStub(channel).Stat(pb.StatRequest())
            return await measure(deployment, num_tokens, rounds, stat.fingerprint)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=3000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    tell(asyncio.run(_main(args.tokens, args.rounds)), args.json)


if __name__ == "__main__":
    main()
