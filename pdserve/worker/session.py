"""One router's stream: what goes out on it, and which requests came in on it."""

from __future__ import annotations

import asyncio

from kvstore.pool import PoolEvents
from pdserve.protocol import worker_pb2 as pb

_MAX_QUEUED_MESSAGES = 16384


class RouterSession:
    """Messages leave in the order of `send`. A router that does not read is cut off rather than buffered for ever."""

    def __init__(self, router_id: str) -> None:
        self.router_id = router_id
        self.subscribed = False  # to KV events: from the snapshot on
        self._events_sequence = 0
        self._outbox: asyncio.Queue[pb.WorkerMessage | None] = asyncio.Queue(_MAX_QUEUED_MESSAGES)
        self._step: list[pb.TokenEvent] = []
        self.overflowed = False

    def send(self, message: pb.WorkerMessage) -> None:
        try:
            self._outbox.put_nowait(message)
        except asyncio.QueueFull:
            self.overflowed = True

    def add_token(self, event: pb.TokenEvent) -> None:
        """Leaves with the next `flush`."""
        self._step.append(event)

    def flush(self) -> None:
        """All tokens of this step in one message."""
        if self._step:
            self.send(pb.WorkerMessage(step=pb.StepOutput(tokens=self._step)))
            self._step.clear()

    def send_events(self, events: PoolEvents, *, snapshot: bool = False) -> None:
        if not (events.stored or events.removed or snapshot):
            return
        message = pb.KvEvents(
            sequence=self._events_sequence,
            snapshot=snapshot,
            stored=b"".join(events.stored),
            removed=b"".join(events.removed),
        )
        self._events_sequence += 1
        self.send(pb.WorkerMessage(kv_events=message))

    async def next(self) -> pb.WorkerMessage | None:
        """The next message to write; None when the stream must end."""
        return None if self.overflowed else await self._outbox.get()
