"""One gRPC channel an address, shared by its calls, closed once the address is unwanted and its last call has ended."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass

import grpc
import grpc.aio

from kvstore.control_plane import KEEPALIVE, ControlPlane
from pdserve.client.errors import NotStarted

DIAL_TIMEOUT_S = 2.0
# A channel dials anew without the backoff of the one before.
_OPTIONS = (
    ("grpc.enable_retries", 0),
    ("grpc.use_local_subchannel_pool", 1),
    *KEEPALIVE,
)


@dataclass(slots=True)
class _Shared:
    channel: grpc.aio.Channel
    calls: int = 0


class Channels:
    def __init__(self, plane: ControlPlane) -> None:
        self._plane = plane
        self._shared: dict[str, _Shared] = {}

    @asynccontextmanager
    async def connected(self, address: str) -> AsyncIterator[grpc.aio.Channel]:
        """A channel with a connection. Raises NotStarted when there is none within DIAL_TIMEOUT_S."""
        shared = self._shared.get(address)
        if shared is None:
            shared = self._shared[address] = _Shared(self._plane.channel(address, _OPTIONS))
        shared.calls += 1
        try:
            if not await _connects(shared.channel):
                self._forget(address, shared)
                raise NotStarted(f"{address} cannot be dialled")
            yield shared.channel
        finally:
            shared.calls -= 1
            if not shared.calls and self._shared.get(address) is not shared:
                await shared.channel.close(None)

    async def keep(self, addresses: Collection[str]) -> None:
        """Only these; others close when their calls have ended."""
        for address in self._shared.keys() - set(addresses):
            shared = self._shared.pop(address)
            if not shared.calls:
                await shared.channel.close(None)

    async def close(self) -> None:
        """Ends running calls too."""
        every = list(self._shared.values())
        self._shared.clear()
        await asyncio.gather(*(shared.channel.close(None) for shared in every))

    def _forget(self, address: str, shared: _Shared) -> None:
        if self._shared.get(address) is shared:
            del self._shared[address]


async def _connects(channel: grpc.aio.Channel) -> bool:
    try:
        async with asyncio.timeout(DIAL_TIMEOUT_S):
            while (state := channel.get_state(try_to_connect=True)) is not grpc.ChannelConnectivity.READY:
                if state in (grpc.ChannelConnectivity.TRANSIENT_FAILURE, grpc.ChannelConnectivity.SHUTDOWN):
                    return False
                await channel.wait_for_state_change(state)
    except TimeoutError:
        return False
    return True
