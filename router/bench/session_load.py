"""A stub worker asked over its own protocol, with no router between: `python -m router.bench.session_load ADDRESS`.

What a router in Python over gRPC cannot be faster than: one session, requests of one token at even times, JSON out.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Annotated

import grpc
import typer
import uvloop

from pdserve.protocol import PROTOCOL_VERSION
from pdserve.protocol import worker_pb2 as pb
from pdserve.protocol.worker_pb2_grpc import WorkerStub

_PROMPT_TOKENS = 16


async def ask(address: str, requests: int, rate: float) -> dict[str, int]:
    outbox: asyncio.Queue[pb.RouterMessage] = asyncio.Queue()
    outbox.put_nowait(pb.RouterMessage(hello=pb.RouterHello(protocol_version=PROTOCOL_VERSION, router_id="load")))
    began_s: dict[str, float] = {}
    took_s: list[float] = []

    async def write() -> AsyncIterator[pb.RouterMessage]:
        while True:
            yield await outbox.get()

    async def submit() -> None:
        start_s = time.perf_counter()
        sampling = pb.Sampling(max_tokens=1, top_p=1.0, repetition_penalty=1.0)
        for number in range(requests):
            due_s = start_s + number / rate
            await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
            request = pb.Submit(
                request_id=str(number),
                attempt=1,
                prompt_token_ids=range(_PROMPT_TOKENS),
                sampling=sampling,
                root_key=b"load",
                remaining_s=60.0,
            )
            began_s[request.request_id] = due_s
            outbox.put_nowait(pb.RouterMessage(submit=request))

    async with grpc.aio.insecure_channel(address) as channel:
        asking = asyncio.create_task(submit())
        async for message in WorkerStub(channel).Session(write()):
            now_s = time.perf_counter()
            took_s += [now_s - began_s.pop(event.request_id) for event in message.step.tokens]
            if len(took_s) == requests:
                break
        await asking
    took_s.sort()
    return {"p50_us": round(took_s[requests // 2] * 1e6), "p99_us": round(took_s[requests * 99 // 100] * 1e6)}


def main(
    address: Annotated[str, typer.Argument(help="host:port")],
    requests: int = 1000,
    rate: Annotated[float, typer.Option(help="Requests a second.")] = 100.0,
) -> None:
    """Send requests and print how long they took."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        print(json.dumps(runner.run(ask(address, requests, rate))))


if __name__ == "__main__":
    typer.run(main)
