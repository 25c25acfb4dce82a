"""The two ends of one ticket as state machines: events in, actions out; no transport, no clock, no lock.

Ordinals name the operations of a ticket: n < MANIFEST is block n, MANIFEST is the manifest. The caller carries actions
out in the order given and feeds back what happened. A receive is cancelled only after the sender has said what it sent:
a message that finds its receive gone would hold up the sender for ever. Hence fence first, cancel then.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum

from kvstore.errors import TransferError
from kvstore.keys import BlockKey
from kvstore.transfer.manifest import BlockSeal, Manifest, Subject
from kvstore.transfer.tags import MANIFEST, MAX_BLOCKS
from kvstore.transfer.transport import Outcome


@dataclass(frozen=True, slots=True)
class Commit:
    """All blocks are verified and the caller's: publish them and go on from these output tokens, oldest first."""

    output_token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Fail:
    """The ticket failed; given once. Blocks follow in `Release` as they become safe."""

    reason: str


@dataclass(frozen=True, slots=True)
class AskFence:
    """Ask the sender to stop and to say what it sent; if it does not answer in time, close the link."""

    ticket_id: int
    peer: str


@dataclass(frozen=True, slots=True)
class CancelReceives:
    """Cancel these posted receives; their completions are awaited all the same."""

    ordinals: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Release:
    """Nothing can land in these blocks any more: give them back to the pool."""

    block_ids: tuple[int, ...]


ReceiveAction = Commit | Fail | AskFence | CancelReceives | Release


class ReceiveState(Enum):
    RECEIVING = "receiving"
    VERIFIED = "verified"
    ABORTING = "aborting"
    DRAINED = "drained"


@dataclass(frozen=True, slots=True)
class ExpectedBlock:
    """A block of the receiver's pool that a message is to fill, at its position in the ticket."""

    block_id: int
    generation: int


class ReceiveSession:
    """The decode side of a ticket.

        RECEIVING ── all landed, manifest matches ──> VERIFIED
            └── abort, bad end, bad manifest ──> ABORTING (quarantine) ── every receive ended ──> DRAINED

    A block is released once, after its own receive has ended, or committed, never both. A link that closes ends every
    receive. Events that come twice or after the end change nothing and are counted in `late_events`.
    """

    def __init__(self, subject: Subject, peer: str, blocks: Sequence[ExpectedBlock]) -> None:
        if len(blocks) > MAX_BLOCKS:
            raise ValueError(f"a ticket has at most {MAX_BLOCKS} blocks, got {len(blocks)}")
        self.subject = subject
        self.peer = peer
        self.state = ReceiveState.RECEIVING
        self.late_events = 0
        self._blocks = tuple(blocks)
        self._open = {*range(len(blocks)), MANIFEST}  # receives that have not ended
        self._held = set(range(len(blocks)))  # blocks neither released nor committed
        self._checksums: dict[int, int] = {}
        self._manifest: Manifest | None = None

    def block_landed(self, ordinal: int, checksum: int) -> list[ReceiveAction]:
        """A block's receive is DONE; `checksum` is that of the bytes as they lie in our memory."""
        if not self._end(ordinal):
            return []
        self._checksums[ordinal] = checksum
        return self._after_end(ordinal)

    def manifest_landed(self, data: bytes) -> list[ReceiveAction]:
        if not self._end(MANIFEST):
            return []
        if self.state is not ReceiveState.RECEIVING:
            return self._after_end(MANIFEST)
        try:
            self._manifest = Manifest.decode(data, self.subject, len(self._blocks))
        except TransferError as error:
            return self._abort(str(error))
        return self._after_end(MANIFEST)

    def ended_badly(self, ordinal: int, outcome: Outcome) -> list[ReceiveAction]:
        """A receive ended with anything but DONE."""
        if not self._end(ordinal):
            return []
        if self.state is ReceiveState.RECEIVING:
            return self._abort(f"receive {ordinal} ended as {outcome.value}")
        return self._after_end(ordinal)

    def abort(self, reason: str) -> list[ReceiveAction]:
        """The request is over, or the transfer's deadline has passed."""
        if self.state is not ReceiveState.RECEIVING:
            self.late_events += 1
            return []
        return self._abort(reason)

    def fenced(self, sent: Iterable[int]) -> list[ReceiveAction]:
        """The sender has stopped for good after these ordinals: what it did not send can be cancelled."""
        if self.state is not ReceiveState.ABORTING:
            self.late_events += 1
            return []
        unsent = self._open.difference(sent)
        return [CancelReceives(tuple(sorted(unsent)))] if unsent else []

    def _end(self, ordinal: int) -> bool:
        """Note the end of a receive; False if it is not open (any more)."""
        if ordinal not in self._open:
            self.late_events += 1
            return False
        self._open.remove(ordinal)
        return True

    def _after_end(self, ordinal: int) -> list[ReceiveAction]:
        if self.state is ReceiveState.RECEIVING:
            return self._verify(self._checksums if ordinal == MANIFEST else (ordinal,))
        actions = self._release(self._held & {ordinal})
        if not self._open:
            self.state = ReceiveState.DRAINED
        return actions

    def _verify(self, ordinals: Iterable[int]) -> list[ReceiveAction]:
        """Judge these landed blocks; commit when all are there."""
        if self._manifest is None:
            return []
        for ordinal in ordinals:
            seal, expected = self._manifest.seals[ordinal], self._blocks[ordinal]
            if seal != BlockSeal(expected.generation, self._checksums[ordinal]):
                kind = "checksum" if seal.generation == expected.generation else "generation"
                return self._abort(f"block {ordinal} of the ticket has the wrong {kind}")
        if self._open:
            return []
        self.state = ReceiveState.VERIFIED
        self._held.clear()
        return [Commit(self._manifest.output_token_ids)]

    def _abort(self, reason: str) -> list[ReceiveAction]:
        actions: list[ReceiveAction] = [Fail(reason), *self._release(self._held - self._open)]
        if self._open:
            self.state = ReceiveState.ABORTING
            return [*actions, AskFence(self.subject.ticket_id, self.peer)]
        self.state = ReceiveState.DRAINED
        return actions

    def _release(self, ordinals: set[int]) -> list[ReceiveAction]:
        block_ids = tuple(self._blocks[ordinal].block_id for ordinal in sorted(ordinals))
        self._held = self._held - ordinals
        return [Release(block_ids)] if block_ids else []


@dataclass(frozen=True, slots=True)
class SendBlock:
    """Send block `ordinal` of the ticket from where it lies; it must not change until the send has ended."""

    ordinal: int


@dataclass(frozen=True, slots=True)
class SendManifest:
    data: bytes


@dataclass(frozen=True, slots=True)
class Fenced:
    """Answer the receiver's fence: these ordinals were sent, none is under way, and no other will be sent."""

    sent: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SendFailed:
    """The ticket failed on this side; given at most once."""

    reason: str


@dataclass(frozen=True, slots=True)
class Unpin:
    """No send of the ticket reads its blocks any more; given once."""


SendAction = SendBlock | SendManifest | Fenced | SendFailed | Unpin


class SendState(Enum):
    SENDING = "sending"
    FINISHING = "finishing"
    DONE = "done"
    STOPPING = "stopping"
    STOPPED = "stopped"


class SendSession:
    """The prefill side of a ticket.

        SENDING ── finish: manifest sent ──> FINISHING ── every send is DONE ──> DONE
           └── fence, abort, failed send ──────┴──> STOPPING ── every send ended ──> STOPPED

    Blocks are sent in the order of the ticket, each as soon as it is ready, and stay pinned until DONE or STOPPED. A
    fence is answered when nothing is under way; one that comes after the end is answered at once.
    """

    def __init__(self, ticket_id: int, generations: Sequence[int]) -> None:
        if len(generations) > MAX_BLOCKS:
            raise ValueError(f"a ticket has at most {MAX_BLOCKS} blocks, got {len(generations)}")
        self.ticket_id = ticket_id
        self.state = SendState.SENDING
        self.late_events = 0
        self._generations = tuple(generations)
        self._seals: list[BlockSeal] = []
        self._sent: list[int] = []
        self._under_way: set[int] = set()
        self._fence_asked = False

    @property
    def num_ready(self) -> int:
        """Blocks that are sent or under way: the ordinal that `ready` wants next."""
        return len(self._seals)

    def ready(self, ordinal: int, checksum: int) -> list[SendAction]:
        """Block `ordinal` holds its final bytes. Raises ValueError out of order."""
        if self.state is not SendState.SENDING:
            self.late_events += 1
            return []
        if ordinal != len(self._seals) or ordinal >= len(self._generations):
            raise ValueError(f"block {ordinal} of {len(self._generations)} is ready, expected {len(self._seals)}")
        self._seals.append(BlockSeal(self._generations[ordinal], checksum))
        self._start(ordinal)
        return [SendBlock(ordinal)]

    def finish(self, content: BlockKey, output_token_ids: Sequence[int]) -> list[SendAction]:
        """All blocks are ready, the KV of `content`; these are all output tokens so far. Raises ValueError if not."""
        if self.state is not SendState.SENDING:
            self.late_events += 1
            return []
        if len(self._seals) != len(self._generations):
            raise ValueError(f"only {len(self._seals)} of {len(self._generations)} blocks are ready")
        self.state = SendState.FINISHING
        self._start(MANIFEST)
        return [SendManifest(Manifest(self.ticket_id, content, tuple(self._seals), tuple(output_token_ids)).encode())]

    def ended(self, ordinal: int, outcome: Outcome) -> list[SendAction]:
        """A send has ended."""
        if ordinal not in self._under_way:
            self.late_events += 1
            return []
        self._under_way.remove(ordinal)
        actions: list[SendAction] = []
        if outcome is not Outcome.DONE and self.state in (SendState.SENDING, SendState.FINISHING):
            self.state = SendState.STOPPING
            actions.append(SendFailed(f"send {ordinal} ended as {outcome.value}"))
        return actions + self._settle()

    def fence(self) -> list[SendAction]:
        """The receiver asks us to stop."""
        self._fence_asked = True
        return self._stop()

    def abort(self) -> list[SendAction]:
        """The request is over on this side; the receiver learns it from the control plane and fences."""
        return self._stop()

    def _start(self, ordinal: int) -> None:
        self._sent.append(ordinal)
        self._under_way.add(ordinal)

    def _stop(self) -> list[SendAction]:
        if self.state in (SendState.SENDING, SendState.FINISHING):
            self.state = SendState.STOPPING
        return self._settle()

    def _settle(self) -> list[SendAction]:
        """What can be said once nothing is under way."""
        if self._under_way:
            return []
        actions: list[SendAction] = []
        if self.state in (SendState.FINISHING, SendState.STOPPING):
            self.state = SendState.DONE if self.state is SendState.FINISHING else SendState.STOPPED
            actions.append(Unpin())
        if self._fence_asked:
            self._fence_asked = False
            actions.append(Fenced(tuple(self._sent)))
        return actions
