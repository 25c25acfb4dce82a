"""The ledger of a node, as its admin port tells it; it sums whenever it is asked for."""

from __future__ import annotations

import asyncio
import json
import urllib.request
from typing import Any

from tests.kvstore.store.node_process import NodeProcess

DEADLINE_S = 20.0


async def ledger(node: NodeProcess) -> dict[str, Any]:
    def get() -> Any:
        with urllib.request.urlopen(f"http://{node.admin_address}/ledger", timeout=DEADLINE_S) as reply:
            return json.load(reply)

    found: dict[str, Any] = await asyncio.to_thread(get)
    assert found["sums"]
    return found


async def until(node: NodeProcess, state: str, count: int) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while (await ledger(node))["by_state"][state] != count:
            await asyncio.sleep(0.02)
