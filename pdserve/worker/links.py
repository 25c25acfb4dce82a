"""Links to peer workers: prefill dials decode, both watch each other, and a link that fails is closed and dialled anew.

    DIALLING ── Connect answered, probe arrived ──> UP ── peer died, operation failed, peer unlisted ──> CLOSED
        └──────────── refused or late: backoff ────────────────────────────────────────────────────────────┘

Closing is the proof that nothing lands any more, so every open operation of a closed link completes as FAILED first. On
one machine the peer's death is learnt from its pidfd at once; between machines from UCX's own keep-alive and from
deadlines.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterable
from functools import partial

import grpc
import grpc.aio
import numpy as np

from kvstore.control_plane import IN_THE_CLEAR, KEEPALIVE, ControlPlane
from kvstore.errors import TransferError
from kvstore.transfer.loop_link import LoopLink
from kvstore.transfer.tags import message_tag
from kvstore.transfer.transport import Completion, Memory, Outcome, Transport
from pdserve.protocol import worker_pb2 as pb
from pdserve.protocol.worker_pb2_grpc import WorkerStub
from pdserve.worker.config import LinkLimits

log = logging.getLogger(__name__)

PROBE_TICKET = 0  # real tickets count from 1
_PROBES = 3  # the first one warms the connection up
CHANNEL_OPTIONS = (
    *KEEPALIVE,
    ("grpc.keepalive_permit_without_calls", 1),
)
# A peer that was gone for long comes back under its address: gRPC's own pauses, of up to 2 minutes, would hide that.
_CLIENT_OPTIONS = (
    *CHANNEL_OPTIONS,
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
)


class PeerLink(LoopLink):
    """One link as this worker sees it. Use on the asyncio loop only."""

    def __init__(
        self,
        peer_id: str,
        incarnation: int,
        address: str,
        transport: Transport,
        loop: asyncio.AbstractEventLoop,
        *,
        same_host: bool,
    ) -> None:
        super().__init__(peer_id, transport, loop, same_host=same_host)
        self.incarnation = incarnation
        self.address = address
        self.peer_address = b""  # of the peer's end
        self.transport = ""
        self.bytes_per_second = 0.0
        self.gone = asyncio.Event()


class LinkTable:
    """All links of this worker, by peer. Use on the asyncio loop only."""

    def __init__(
        self,
        hello: pb.WorkerHello,
        transport: Transport,
        limits: LinkLimits,
        control: ControlPlane = IN_THE_CLEAR,
        scratch: Memory | None = None,
    ) -> None:
        """
        Args:
            scratch: sent and received to try a link out; of the kind that blocks are of. None: memory of the host.
        """
        self._control = control
        self._hello = hello  # what peers may know of this worker
        self._transport = transport
        self._limits = limits
        self._scratch = np.zeros(limits.probe_bytes, np.uint8) if scratch is None else scratch
        self.on_report: Callable[[pb.LinkReport], None] = lambda report: None
        self._loop = asyncio.get_running_loop()
        self._links: dict[str, PeerLink] = {}
        self._dialers: dict[str, tuple[pb.Peer, asyncio.Task[None]]] = {}
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._closing: set[asyncio.Future[None]] = set()
        self._last_report: dict[str, pb.LinkReport] = {}

    def get(self, peer_id: str, incarnation: int) -> PeerLink | None:
        link = self._links.get(peer_id)
        return link if link is not None and link.incarnation == incarnation else None

    def reports(self) -> Iterable[pb.LinkReport]:
        """The latest state of every link, for a router that has just joined."""
        return self._last_report.values()

    def stub(self, address: str) -> WorkerStub:
        """A client for a peer's control service."""
        channel = self._channels.get(address)
        if channel is None:
            channel = self._channels[address] = self._control.channel(address, _CLIENT_OPTIONS)
        return WorkerStub(channel)

    # --- prefill dials -----------------------------------------------------------------------------------------------

    def set_peers(self, peers: Iterable[pb.Peer]) -> None:
        """Be linked to exactly these decode workers."""
        wanted = {peer.worker_id: peer for peer in peers if peer.worker_id != self._hello.worker_id}
        for peer_id, (peer, task) in list(self._dialers.items()):
            if wanted.get(peer_id) != peer:
                task.cancel()
                self._await_end(task)
                del self._dialers[peer_id]
                self._last_report.pop(peer_id, None)
                if peer_id in self._links:
                    self.close(self._links[peer_id], "no longer listed")
        for peer_id, peer in wanted.items():
            if peer_id not in self._dialers:
                task = self._loop.create_task(self._keep_linked(peer), name=f"link to {peer_id}")
                self._dialers[peer_id] = (peer, task)

    async def _keep_linked(self, peer: pb.Peer) -> None:
        """Dial until it works, and again whenever the link has closed."""
        attempt = 0
        while True:
            try:
                link = await self._dial(peer)
            except (grpc.aio.AioRpcError, TransferError, TimeoutError) as error:
                reason = error.details() if isinstance(error, grpc.aio.AioRpcError) else str(error)
                self._publish(peer, error=reason or type(error).__name__)
                await asyncio.sleep(self._limits.backoff_s[min(attempt, len(self._limits.backoff_s) - 1)])
                attempt += 1
                continue
            attempt = 0
            gigabytes_per_s = link.bytes_per_second / 1e9
            log.info("link to %s is up: %s, %.1f GB/s in a probe", peer.worker_id, link.transport, gigabytes_per_s)
            self._publish(peer, link=link)
            await self._until_gone(peer, link)

    async def _until_gone(self, peer: pb.Peer, link: PeerLink) -> None:
        """With nothing under way no operation fails when the peer closes its end: ask now and then whether it did."""
        while True:
            try:
                async with asyncio.timeout(self._limits.check_s):
                    await link.gone.wait()
                return
            except TimeoutError:
                with contextlib.suppress(grpc.aio.AioRpcError):  # silence says nothing about the link
                    if (await self._connect(peer, link)).link_address != link.peer_address:
                        self.close(link, "the peer has closed its end")

    async def _connect(self, peer: pb.Peer, link: PeerLink) -> pb.ConnectReply:
        mine = self._hello
        request = pb.ConnectRequest(
            worker_id=mine.worker_id,
            incarnation=mine.incarnation,
            address=mine.address,
            fingerprint=mine.fingerprint,
            block_bytes=mine.block_bytes,
            host_id=mine.host_id,
            link_address=link.link.address,
            transport=self._transport.name,
            pid=os.getpid(),
        )
        reply: pb.ConnectReply = await self.stub(peer.address).Connect(request, timeout=self._limits.dial_s)
        return reply

    async def _dial(self, peer: pb.Peer) -> PeerLink:
        same_host = peer.host_id == self._hello.host_id
        if (older := self._links.get(peer.worker_id)) is not None:  # accepted while the roles were the other way round
            await self.close(older, "it is dialled")
        link = self._open(peer.worker_id, peer.incarnation, peer.address, same_host=same_host)
        try:
            reply = await self._connect(peer, link)
            if reply.incarnation != peer.incarnation:
                raise TransferError(f"{peer.worker_id} has restarted since it was listed")
            link.link.connect(reply.link_address)
            link.peer_address = reply.link_address
            if same_host:
                self._watch(link, reply.pid)
            async with asyncio.timeout(self._limits.dial_s):
                link.bytes_per_second = await self._probe(link)
            link.transport = link.link.describe()
        except BaseException:
            await self.close(link, "dialling failed")
            raise
        return link

    async def _probe(self, link: PeerLink) -> float:
        """Bytes a second to a peer that has posted `_PROBES` receives."""
        seconds = float("inf")
        for number in range(_PROBES):
            done: asyncio.Future[Completion] = self._loop.create_future()
            began_s = time.monotonic()
            link.send(message_tag(PROBE_TICKET, number), self._scratch, partial(_resolve, done))
            completion = await done
            if completion.outcome is not Outcome.DONE:
                raise TransferError(f"the probe to {link.peer_id} failed: {completion.error}")
            seconds = min(seconds, time.monotonic() - began_s)
        return self._scratch.nbytes / seconds

    def _publish(self, peer: pb.Peer, link: PeerLink | None = None, error: str = "") -> None:
        report = pb.LinkReport(peer_id=peer.worker_id, peer_incarnation=peer.incarnation, error=error)
        report.up = link is not None
        if link is not None:
            report.transport, report.bytes_per_second = link.transport, link.bytes_per_second
        if self._last_report.get(peer.worker_id) != report:
            if error:
                log.warning("no link to %s: %s", peer.worker_id, error)
            self._last_report[peer.worker_id] = report
            self.on_report(report)

    # --- decode accepts ----------------------------------------------------------------------------------------------

    async def accept(self, request: pb.ConnectRequest) -> pb.ConnectReply:
        """Idempotent for one end of the peer's. Raises TransferError, with what differs, if the two do not fit."""
        mine = self._hello
        if request.transport != self._transport.name:
            ours = self._transport.name
            raise TransferError(f"{mine.worker_id} moves blocks by {ours}, the peer by {request.transport}")
        if request.fingerprint != mine.fingerprint or request.block_bytes != mine.block_bytes:
            raise TransferError(
                f"{request.worker_id} and {mine.worker_id} differ in model, dtype or block layout "
                f"(blocks of {request.block_bytes} and {mine.block_bytes} bytes): start both with the same settings"
            )
        while (older := self._links.get(request.worker_id)) is not None:
            if older.peer_address == request.link_address:
                return self._accepted(older)
            await self.close(older, "the peer dials again")
        same_host = request.host_id == mine.host_id
        link = self._open(request.worker_id, request.incarnation, request.address, same_host=same_host)
        try:
            for number in range(_PROBES):
                link.receive(message_tag(PROBE_TICKET, number), self._scratch, lambda completion: None)
            link.link.connect(request.link_address)
            link.peer_address = request.link_address
            if same_host:
                self._watch(link, request.pid)
        except TransferError:
            await self.close(link, "connecting back failed")
            raise
        return self._accepted(link)

    def _accepted(self, link: PeerLink) -> pb.ConnectReply:
        mine = self._hello
        return pb.ConnectReply(
            worker_id=mine.worker_id, incarnation=mine.incarnation, link_address=link.link.address, pid=os.getpid()
        )

    # --- one link ----------------------------------------------------------------------------------------------------

    def _open(self, peer_id: str, incarnation: int, address: str, *, same_host: bool) -> PeerLink:
        link = PeerLink(peer_id, incarnation, address, self._transport, self._loop, same_host=same_host)
        self._links[peer_id] = link
        return link

    def _watch(self, link: PeerLink, pid: int) -> None:
        """Close the link as soon as the peer's process is gone. Raises TransferError."""
        link.watch(pid, lambda: self.close(link, "the peer's process has ended"))

    def close(self, link: PeerLink, reason: str) -> asyncio.Future[None]:
        """Close for good; done once it is proven that nothing lands any more. Open operations complete as FAILED."""
        if link.closing is None:
            log.info("closing the link with %s: %s", link.peer_id, reason)
            if self._links.get(link.peer_id) is link:
                del self._links[link.peer_id]
            last_report = self._last_report.get(link.peer_id)
            if last_report is not None and last_report.up:  # else the dialler tells why it is not up
                self._publish(self._dialers[link.peer_id][0], error=reason)
            self._await_end(closing := link.close())
            closing.add_done_callback(lambda _: self._drop_channel(link.address))
            link.gone.set()
        return asyncio.shield(link.close())  # a call that is cancelled while it waits must not undo it for all

    def _drop_channel(self, address: str) -> None:
        """A peer that comes back has another address: keep no channel that nobody uses."""
        used = {peer.address for peer, _ in self._dialers.values()} | {link.address for link in self._links.values()}
        if address not in used and address in self._channels:
            self._await_end(asyncio.ensure_future(self._channels.pop(address).close(None)))

    def _await_end(self, ending: asyncio.Future[None]) -> None:
        """Before we are shut down."""
        self._closing.add(ending)
        ending.add_done_callback(self._closing.discard)

    async def shut_down(self) -> None:
        """Close all links and channels."""
        self.set_peers(())
        for link in list(self._links.values()):
            self.close(link, "this worker is ending")
        await asyncio.gather(*self._closing, return_exceptions=True)
        for channel in self._channels.values():
            await channel.close(None)


def _resolve(future: asyncio.Future[Completion], completion: Completion) -> None:
    """The probe that waited may have been given up."""
    if not future.done():
        future.set_result(completion)
