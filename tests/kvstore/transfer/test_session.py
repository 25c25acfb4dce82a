"""Whatever happens in whatever order: no wrong byte is committed, and each block is given back or committed once."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.keys import KEY_BYTES, BlockKey
from kvstore.transfer.checksum import block_checksum
from kvstore.transfer.manifest import BlockSeal, Manifest, Subject
from kvstore.transfer.session import (
    AskFence,
    CancelReceives,
    Commit,
    ExpectedBlock,
    Fail,
    Fenced,
    ReceiveAction,
    ReceiveSession,
    ReceiveState,
    Release,
    SendAction,
    SendBlock,
    SendFailed,
    SendManifest,
    SendSession,
    SendState,
    Unpin,
)
from kvstore.transfer.tags import MANIFEST
from kvstore.transfer.transport import Outcome

TICKET, PEER, TOKENS = 77, "prefill-1", (5, 6, 7)
CONTENT = BlockKey(b"c" * KEY_BYTES)
SUBJECT = Subject(TICKET, CONTENT, len(TOKENS), vocab_size=10)
BLOCKS = (ExpectedBlock(40, 3), ExpectedBlock(41, 9), ExpectedBlock(42, 1))
BAD = (Outcome.CANCELLED, Outcome.FAILED, Outcome.TRUNCATED)


def receiving() -> ReceiveSession:
    return ReceiveSession(SUBJECT, PEER, BLOCKS)


def manifest(generations: tuple[int, ...] = (3, 9, 1), checksums: tuple[int, ...] = (100, 101, 102)) -> bytes:
    seals = tuple(BlockSeal(*pair) for pair in zip(generations, checksums, strict=True))
    return Manifest(TICKET, CONTENT, seals, TOKENS).encode()


def close(session: ReceiveSession, ordinal: int) -> list[ReceiveAction]:
    """What the end of its link does to one of the open receives."""
    return session.ended_badly(ordinal, Outcome.FAILED)


# --- the receiver, case by case ---


@pytest.mark.parametrize("manifest_at", range(4))
def test_verified_ticket_commits_wherever_the_manifest_comes(manifest_at: int) -> None:
    session = receiving()
    actions: list[ReceiveAction] = []
    for step in range(4):
        if step == manifest_at:
            actions += session.manifest_landed(manifest())
        if step < 3:
            actions += session.block_landed(step, 100 + step)
    assert actions == [Commit(TOKENS)]
    assert session.state is ReceiveState.VERIFIED


def test_ticket_without_blocks_commits_on_its_manifest() -> None:
    session = ReceiveSession(replace(SUBJECT, num_tokens=1), PEER, ())
    assert session.manifest_landed(Manifest(TICKET, CONTENT, (), (5,)).encode()) == [Commit((5,))]


def test_wrong_checksum_fails_and_gives_back_all_at_once_when_all_landed() -> None:
    session = receiving()
    for n, checksum in enumerate((100, 999, 102)):
        session.block_landed(n, checksum)
    assert session.manifest_landed(manifest()) == [
        Fail("block 1 of the ticket has the wrong checksum"),
        Release((40, 41, 42)),
    ]
    assert session.state is ReceiveState.DRAINED


def test_wrong_generation_fails_early() -> None:
    session = receiving()
    session.manifest_landed(manifest(generations=(3, 8, 1)))
    assert session.block_landed(1, 101) == [
        Fail("block 1 of the ticket has the wrong generation"),
        Release((41,)),
        AskFence(TICKET, PEER),
    ]


def test_aborted_transfer_quarantines_until_drained() -> None:
    session = receiving()
    session.block_landed(0, 100)
    assert session.abort("client gone") == [Fail("client gone"), Release((40,)), AskFence(TICKET, PEER)]
    assert session.fenced([0, 1]) == [CancelReceives((2, MANIFEST))]
    assert session.block_landed(1, 101) == [Release((41,))]
    assert session.ended_badly(MANIFEST, Outcome.CANCELLED) == []
    assert session.state is ReceiveState.ABORTING
    assert session.ended_badly(2, Outcome.CANCELLED) == [Release((42,))]
    assert session.state is ReceiveState.DRAINED


def test_closed_link_gives_back_what_was_in_quarantine() -> None:
    session = receiving()
    session.abort("deadline")
    assert [close(session, n) for n in (0, 1, 2)] == [[Release((40,))], [Release((41,))], [Release((42,))]]
    assert close(session, MANIFEST) == []
    assert session.state is ReceiveState.DRAINED


def test_closed_link_fails_a_running_ticket() -> None:
    session = receiving()
    assert close(session, 0) == [Fail("receive 0 ended as failed"), Release((40,)), AskFence(TICKET, PEER)]


def test_damaged_manifest_fails_the_ticket() -> None:
    session = receiving()
    fail, ask = session.manifest_landed(b"x" + manifest()[1:])
    assert isinstance(fail, Fail)
    assert ask == AskFence(TICKET, PEER)


def test_late_events_are_counted_and_ignored() -> None:
    session = receiving()
    session.abort("over")
    for ordinal in (0, 1, 2, MANIFEST):
        close(session, ordinal)
    assert session.block_landed(0, 100) == session.manifest_landed(manifest()) == []
    assert session.ended_badly(1, Outcome.FAILED) == session.abort("late") == session.fenced([]) == []
    assert session.late_events == 5


# --- the sender, case by case ---


def test_sender_sends_in_order_then_the_manifest_then_unpins() -> None:
    session = SendSession(TICKET, (3, 9, 1))
    for n in range(3):
        assert session.ready(n, 100 + n) == [SendBlock(n)]
    assert session.finish(CONTENT, TOKENS) == [SendManifest(manifest())]
    for ordinal in (1, MANIFEST, 0):
        assert session.ended(ordinal, Outcome.DONE) == []
    assert session.ended(2, Outcome.DONE) == [Unpin()]
    assert session.state is SendState.DONE
    assert session.fence() == [Fenced((0, 1, 2, MANIFEST))]


def test_fence_stops_sending_and_answers_when_nothing_is_under_way() -> None:
    session = SendSession(TICKET, (3, 9, 1))
    session.ready(0, 100)
    assert session.fence() == []
    assert session.ready(1, 101) == session.finish(CONTENT, TOKENS) == []
    assert session.ended(0, Outcome.DONE) == [Unpin(), Fenced((0,))]
    assert session.fence() == [Fenced((0,))]
    assert session.state is SendState.STOPPED


def test_failed_send_stops_the_ticket_once() -> None:
    session = SendSession(TICKET, (3, 9))
    session.ready(0, 100)
    session.ready(1, 101)
    assert session.ended(0, Outcome.FAILED) == [SendFailed("send 0 ended as failed")]
    assert session.ended(1, Outcome.FAILED) == [Unpin()]


def test_blocks_out_of_order_or_missing_are_our_bug() -> None:
    session = SendSession(TICKET, (3, 9))
    with pytest.raises(ValueError, match="expected 0"):
        session.ready(1, 0)
    with pytest.raises(ValueError, match="only 0 of 2"):
        session.finish(CONTENT, TOKENS)


# --- properties ---

receive_events = st.one_of(
    st.tuples(st.just("landed"), st.integers(0, 3), st.sampled_from([100, 101, 102])),
    st.tuples(st.just("bad"), st.sampled_from([0, 1, 2, 3, MANIFEST]), st.sampled_from(BAD)),
    st.tuples(st.just("manifest"), st.sampled_from([manifest(), manifest((3, 9, 2)), b"", manifest()[:-1]])),
    st.tuples(st.just("abort"), st.just("why")),
    st.tuples(st.just("fenced"), st.sets(st.sampled_from([0, 1, 2, MANIFEST]))),
)


def feed(session: ReceiveSession, event: tuple[object, ...]) -> list[ReceiveAction]:
    name, *arguments = event
    methods = {
        "landed": session.block_landed,
        "bad": session.ended_badly,
        "manifest": session.manifest_landed,
        "abort": session.abort,
        "fenced": session.fenced,
    }
    return methods[str(name)](*arguments)  # type: ignore[operator]


@given(st.lists(receive_events, max_size=30))
def test_any_order_of_events_releases_once_and_ends(events: list[tuple[object, ...]]) -> None:
    session = receiving()
    ended: set[int] = set()
    landed: dict[int, int] = {}
    actions: list[ReceiveAction] = []
    rest = [("bad", ordinal, Outcome.FAILED) for ordinal in (0, 1, 2, MANIFEST)]
    for event in [*events, ("abort", "end"), *rest]:
        if event[0] in ("landed", "bad", "manifest"):
            ordinal = MANIFEST if event[0] == "manifest" else int(str(event[1]))
            if event[0] == "landed" and ordinal not in ended:
                landed[ordinal] = int(str(event[2]))
            ended.add(ordinal)
        new = feed(session, event)
        for action in new:
            if isinstance(action, Release):
                assert {block_id - 40 for block_id in action.block_ids} <= ended
            if isinstance(action, Commit):
                assert landed == {0: 100, 1: 101, 2: 102}
        actions += new
    released = [block_id for action in actions if isinstance(action, Release) for block_id in action.block_ids]
    commits = [action for action in actions if isinstance(action, Commit)]
    fails = [action for action in actions if isinstance(action, Fail)]
    assert len(commits) + len(fails) == 1
    assert sorted(released) == ([] if commits else [40, 41, 42])
    assert session.state in (ReceiveState.VERIFIED, ReceiveState.DRAINED)


# --- both ends over a model network ---

BLOCK_BYTES = 64


@dataclass
class Model:
    """A pair of sessions, the messages between them, and everything that may go wrong, one step at a time.

    As in UCX, a send ends only when its message has met a posted receive, so a receive cancelled too early would show
    as a sender that never ends.
    """

    count: int
    seed: int
    memory: np.ndarray = field(init=False)
    source: np.ndarray = field(init=False)
    receiver: ReceiveSession = field(init=False)
    sender: SendSession = field(init=False)
    posted: set[int] = field(init=False)
    flying: dict[int, bytes] = field(default_factory=dict)
    cancels: list[int] = field(default_factory=list)
    fence_asked: bool = False
    fence_answer: tuple[int, ...] | None = None
    closed: bool = False
    committed: tuple[int, ...] | None = None
    failed: int = 0
    unpinned: int = 0
    released: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        random = np.random.default_rng(self.seed)
        self.source = random.integers(0, 256, (self.count, BLOCK_BYTES), dtype=np.uint8)
        self.memory = np.zeros((self.count, BLOCK_BYTES), np.uint8)
        blocks = [ExpectedBlock(n, 10 + n) for n in range(self.count)]
        self.receiver = ReceiveSession(SUBJECT, PEER, blocks)
        self.sender = SendSession(TICKET, [10 + n for n in range(self.count)])
        self.posted = {*range(self.count), MANIFEST}

    # What may happen next; each returns whether it did.

    def compute(self) -> bool:
        if self.sender.state is not SendState.SENDING:
            return False
        n = self.sender.num_ready
        ready = n < self.count
        self.send(
            self.sender.ready(n, block_checksum(self.source[n])) if ready else self.sender.finish(CONTENT, TOKENS)
        )
        return True

    def deliver(self, fault: str = "") -> bool:
        arriving = [ordinal for ordinal in self.flying if ordinal in self.posted]
        if not arriving:
            return False
        ordinal = arriving[len(arriving) // 2]
        data = bytearray(self.flying.pop(ordinal))
        self.posted.remove(ordinal)
        if fault == "truncate":
            self.receive(self.receiver.ended_badly(ordinal, Outcome.TRUNCATED))
        else:
            if fault == "corrupt":
                data[len(data) // 2] ^= 1
            self.land(ordinal, bytes(data))
        self.send(self.sender.ended(ordinal, Outcome.FAILED if fault == "fail" else Outcome.DONE))
        return True

    def land(self, ordinal: int, data: bytes) -> None:
        if ordinal == MANIFEST:
            self.receive(self.receiver.manifest_landed(data))
            return
        assert ordinal not in self.released, "bytes landed in a block that was given back"
        self.memory[ordinal] = np.frombuffer(data, np.uint8)
        self.receive(self.receiver.block_landed(ordinal, block_checksum(self.memory[ordinal])))

    def cancel(self) -> bool:
        if not self.cancels:
            return False
        ordinal = self.cancels.pop()
        if ordinal in self.posted:
            self.posted.remove(ordinal)
            self.receive(self.receiver.ended_badly(ordinal, Outcome.CANCELLED))
        return True

    def carry_fence(self) -> bool:
        if self.fence_asked:
            self.fence_asked = False
            self.send(self.sender.fence())
            return True
        if self.fence_answer is not None:
            answer, self.fence_answer = self.fence_answer, None
            self.receive(self.receiver.fenced(answer))
            return True
        return False

    def close_link(self) -> bool:
        if self.closed:
            return False
        self.closed = True
        for ordinal in sorted(self.posted):
            self.receive(close(self.receiver, ordinal))
        self.posted.clear()
        self.lose()
        return True

    def lose(self) -> None:
        """What is under way fails with the link."""
        while self.flying:
            ordinal, _ = self.flying.popitem()
            self.send(self.sender.ended(ordinal, Outcome.FAILED))

    def receive(self, actions: list[ReceiveAction]) -> None:
        for action in actions:
            match action:
                case Commit(output_token_ids):
                    assert self.committed is None
                    self.committed = output_token_ids
                case Fail():
                    self.failed += 1
                case AskFence():
                    self.fence_asked = True
                case CancelReceives(ordinals):
                    self.cancels += ordinals
                case Release(block_ids):
                    self.released += block_ids

    def send(self, actions: list[SendAction]) -> None:
        for action in actions:
            match action:
                case SendBlock(ordinal):
                    self.flying[ordinal] = self.source[ordinal].tobytes()
                case SendManifest(data):
                    self.flying[MANIFEST] = data
                case Fenced(sent):
                    self.fence_answer = sent
                case Unpin():
                    self.unpinned += 1
                case SendFailed():
                    self.receive(self.receiver.abort("the sender failed"))
        if self.closed:
            self.lose()

    def step(self, name: str) -> bool:
        match name:
            case "corrupt" | "truncate" | "fail":
                return self.deliver(name)
            case "abort receiver":
                self.receive(self.receiver.abort("aborted"))
            case "abort sender":
                self.send(self.sender.abort())
                self.receive(self.receiver.abort("the sender aborted"))
            case _:
                return bool(getattr(self, name)())
        return True

    def run_to_the_end(self) -> None:
        """Without further faults; ends because each step uses something up."""
        while any([self.deliver(), self.compute(), self.carry_fence(), self.cancel()]):
            pass


STEPS = ("compute", "deliver", "carry_fence", "cancel")
FAULTS = ("corrupt", "truncate", "fail", "abort receiver", "abort sender", "close_link")


@settings(max_examples=500)
@given(st.integers(0, 5), st.lists(st.sampled_from(STEPS * 4 + FAULTS), max_size=40), st.integers(0, 99))
def test_both_ends_terminate_whole_over_any_network(count: int, steps: list[str], seed: int) -> None:
    model = Model(count, seed)
    for step in steps:
        model.step(step)
    model.run_to_the_end()
    assert model.receiver.state in (ReceiveState.VERIFIED, ReceiveState.DRAINED)
    assert model.sender.state in (SendState.DONE, SendState.STOPPED)
    assert model.unpinned == 1
    if model.committed is None:
        assert model.failed == 1
        assert sorted(model.released) == list(range(count))
    else:
        assert model.committed == TOKENS
        assert model.failed == 0
        assert not model.released
        assert np.array_equal(model.memory, model.source)


def test_undisturbed_transfer_commits() -> None:
    model = Model(5, 1)
    model.run_to_the_end()
    assert model.committed == TOKENS
    assert model.sender.state is SendState.DONE
