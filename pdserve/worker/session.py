"""One router's stream: what goes out on it, and which requests came in on it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence

from kvstore.keys import BlockKey
from kvstore.pool import PoolEvents
from pdserve.protocol import worker_pb2 as pb

_MAX_QUEUED_MESSAGES = 16384


class RouterSession:
    """Messages leave in the order of `send`. A router that does not read is cut off rather than buffered for ever."""

    def __init__(self, router_id: str) -> None:
        self.router_id = router_id
        self._events_sequence: int | None = None  # None until the snapshot has gone out
        self._outbox: asyncio.Queue[pb.WorkerMessage | None] = asyncio.Queue(_MAX_QUEUED_MESSAGES)
        self._step: list[pb.TokenEvent] = []
        self._ended = False

    def send(self, message: pb.WorkerMessage) -> None:
        try:
            self._outbox.put_nowait(message)
        except asyncio.QueueFull:
            self._ended = True

    def end(self) -> None:
        """Let the stream end: `next` gives nothing more."""
        self._ended = True
        with contextlib.suppress(asyncio.QueueFull):
            self._outbox.put_nowait(None)  # wakes a waiting `next`; a full queue has none waiting

    def add_token(self, event: pb.TokenEvent) -> None:
        """Leaves with the next `flush`."""
        self._step.append(event)

    def flush(self) -> None:
        """All tokens of this step in one message."""
        if self._step:
            self.send(pb.WorkerMessage(step=pb.StepOutput(tokens=self._step)))
            self._step.clear()

    def subscribe(self, visible: Sequence[BlockKey]) -> None:
        """KV events from here on, beginning with a snapshot of what is visible now."""
        self._events_sequence = 0
        self._send_events(pb.KvEvents(sequence=0, snapshot=True, stored=b"".join(visible)))

    def send_events(self, events: PoolEvents) -> None:
        if self._events_sequence is not None and (events.stored or events.removed):
            self._events_sequence += 1
            message = pb.KvEvents(
                sequence=self._events_sequence, stored=b"".join(events.stored), removed=b"".join(events.removed)
            )
            self._send_events(message)

    def _send_events(self, message: pb.KvEvents) -> None:
        self.send(pb.WorkerMessage(kv_events=message))

    async def next(self) -> pb.WorkerMessage | None:
        """The next message to write; None when the stream must end."""
        return None if self._ended else await self._outbox.get()
