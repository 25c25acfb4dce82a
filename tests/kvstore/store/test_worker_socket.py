"""The workers' socket against those who do not keep to the protocol: they lose their connection, nobody else does."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from kvstore.errors import Unavailable
from kvstore.store.client import StoreClient
from kvstore.store.frames import HEAD_BYTES, Frame, FrameReader, Kind, encode_frame
from kvstore.store.messages import Hello, LoadReply, Welcome, encode_begin, encode_leases, encode_load
from kvstore.store.tier import Tier
from kvstore.store.worker_server import MAX_WAITING
from tests.kvstore.store.blocks import BLOCK_BYTES, FINGERPRINT, attach, chain, entries, read, save
from tests.kvstore.store.ledgers import DEADLINE_S, ledger, until
from tests.kvstore.store.node_process import NodeProcess, start_node

HELLO = Hello("raw", BLOCK_BYTES, FINGERPRINT)


@pytest.fixture
def node(tmp_path: Path) -> Iterator[NodeProcess]:
    running = start_node(tmp_path)
    yield running
    running.kill()


@pytest.fixture
async def client(node: NodeProcess) -> AsyncIterator[StoreClient]:
    attached = await attach(node.socket)
    await save(attached, chain(1, 4))
    yield attached
    assert await attached.lookup(chain(1, 4)) == [Tier.HOST] * 4, "somebody else's mistake has cost us our session"
    await attached.close()


class Raw:
    """A worker that sends what it likes."""

    def __init__(self, node: NodeProcess) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(DEADLINE_S)
        self.socket.connect(node.socket)
        self.reader = FrameReader()
        self.frames: list[Frame] = []

    def say(self, kind: Kind, payload: bytes, call: int = 1) -> None:
        self.socket.sendall(encode_frame(kind, call, payload))

    def hear(self) -> Frame | None:
        """The next frame; None when the node has hung up."""
        while not self.frames:
            if not (data := self.socket.recv(1 << 16)):
                return None
            self.frames += self.reader.feed(data)
        return self.frames.pop(0)

    def attach(self) -> None:
        self.say(Kind.HELLO, HELLO.encode())
        answer = self.hear()
        assert answer is not None
        assert answer.kind == Kind.REPLY
        assert Welcome.decode(answer.payload).num_slots > 0

    def is_refused(self, what: str) -> None:
        answer = self.hear()
        assert answer is not None
        assert answer.kind == Kind.REFUSAL
        assert what in answer.payload.decode()
        assert self.hear() is None


@pytest.fixture
def raw(node: NodeProcess, client: StoreClient) -> Iterator[Raw]:
    other = Raw(node)
    yield other
    other.socket.close()


@pytest.mark.parametrize("greets", [False, True])
async def test_garbage_is_refused_with_a_sentence(raw: Raw, greets: bool) -> None:
    if greets:
        raw.attach()
    raw.socket.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
    raw.is_refused("no frame of this protocol")


async def test_another_protocol_in_good_frames_is_refused(raw: Raw) -> None:
    raw.say(Kind.HELLO, b"hello")
    raw.is_refused("no HELLO of a pdserve worker")


async def test_another_version_is_refused(raw: Raw) -> None:
    data = bytearray(HELLO.encode())
    data[4] += 1
    raw.say(Kind.HELLO, bytes(data))
    raw.is_refused("speaks version")


async def test_calls_before_hello_and_a_second_hello_are_refused(raw: Raw, node: NodeProcess) -> None:
    raw.say(Kind.LOAD, encode_load(1.0, chain(1, 4)))
    raw.is_refused("says HELLO, once")
    again = Raw(node)
    again.attach()
    again.say(Kind.HELLO, HELLO.encode())
    again.is_refused("no message of kind 1")
    again.socket.close()


@pytest.mark.parametrize(
    ("kind", "payload"),
    [
        (Kind.LOAD, b"1234"),
        (Kind.LOAD, encode_load(1.0, []) + b"x"),
        (Kind.LOOKUP, b"short"),
        (Kind.RELEASE, b"1"),
        (Kind.BEGIN_SAVE, b"\xff" * 40),
        (Kind.COMMIT_SAVE, b"x" * 21),
        (Kind.ABANDON_SAVE, b"x" * 13),
        (Kind.REPORT_CORRUPT, b"x"),
        (Kind.HOLD, b"x"),
        (Kind.HOLD, encode_leases([1])),
        (Kind.REPLY, b""),
    ],
)
async def test_a_malformed_call_ends_its_own_session_only(raw: Raw, kind: Kind, payload: bytes) -> None:
    raw.attach()
    raw.say(kind, payload)
    answer = raw.hear()
    assert answer is not None
    assert answer.kind == Kind.REFUSAL
    assert b"made a mistake" not in answer.payload, "it is not the node's"
    assert raw.hear() is None


async def test_slots_that_are_not_the_callers_are_not_published(raw: Raw, client: StoreClient) -> None:
    raw.attach()
    raw.say(Kind.COMMIT_SAVE, (2**32 - 1).to_bytes(4, "little") + bytes(16))
    raw.say(Kind.ABANDON_SAVE, bytes(12), call=2)
    raw.say(Kind.RELEASE, bytes(8), call=3)
    replies = [raw.hear(), raw.hear()]
    assert [(reply.kind, reply.call) for reply in replies if reply is not None] == [(Kind.REPLY, 1), (Kind.REPLY, 2)]
    assert len(read(await client.load(chain(1, 4), 1.0))) == 4


async def test_half_a_frame_and_a_hang_up_give_back_what_was_held(raw: Raw, node: NodeProcess) -> None:
    raw.attach()
    raw.say(Kind.LOAD, encode_load(1.0, chain(1, 4)))
    answer = raw.hear()
    assert answer is not None
    assert len(LoadReply.decode(answer.payload).slots) == 4
    await until(node, "held", 4)
    raw.socket.sendall(encode_frame(Kind.LOOKUP, 2, bytes(1600))[: HEAD_BYTES + 100])
    raw.socket.close()
    await until(node, "held", 0)


async def test_who_hangs_up_in_the_middle_of_a_call_holds_nothing(raw: Raw, node: NodeProcess) -> None:
    """Nobody will see these slots; this process lives on, so they wait for its word or its end."""
    raw.attach()
    raw.say(Kind.BEGIN_SAVE, encode_begin(entries(chain(2, 3)), ""))
    raw.say(Kind.LOAD, encode_load(1.0, chain(1, 4)), call=2)
    raw.socket.close()
    await until(node, "quarantined", 3)
    await until(node, "held", 0)
    again = await attach(node.socket)  # same process, but another owner's session: it says nothing about those slots
    assert (await ledger(node))["by_state"]["quarantined"] == 3
    await again.close()


def send_up_to(num_bytes: int, connected: socket.socket, data: bytes) -> None:
    while num_bytes > 0:
        num_bytes -= connected.send(data)


async def test_who_reads_no_replies_is_read_from_no_more(raw: Raw, node: NodeProcess) -> None:
    raw.attach()
    raw.socket.setblocking(False)
    request = encode_frame(Kind.LOAD, 7, encode_load(0.0, chain(1, 4)))
    with pytest.raises(BlockingIOError):  # the node must not take all of it
        send_up_to(64 << 20, raw.socket, request * 100)
    pages = int(Path(f"/proc/{node.process.pid}/statm").read_text().split()[1])
    assert pages * os.sysconf("SC_PAGE_SIZE") < 512 << 20
    other = await attach(node.socket, "other")
    assert len(read(await other.load(chain(1, 4), 1.0))) == 4
    await other.close()


async def test_more_calls_that_wait_than_are_allowed_wait_their_turn(raw: Raw) -> None:
    raw.attach()
    count = MAX_WAITING + 20
    numbers = range(1, count + 1)
    for number in numbers:
        raw.say(Kind.REPORT_CORRUPT, chain(1, 1)[0], call=number)
    assert {reply.call for _ in numbers if (reply := raw.hear()) is not None} == set(numbers)


@pytest.mark.parametrize("answer", [b"x" * 64, encode_frame(Kind.REPLY, 99, b""), encode_frame(Kind.REPLY, 1, b"x")])
async def test_a_client_of_something_else_is_detached_and_never_fails(tmp_path: Path, answer: bytes) -> None:
    path = tmp_path / "other.sock"

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(answer)
        await reader.read()
        writer.close()

    async with await asyncio.start_unix_server(serve, path):
        client = await attach(str(path))
        assert not client.attached
        assert await client.lookup(chain(1, 1)) == []
        assert read(await client.load(chain(1, 1), 1.0)) == []
        assert await client.begin_save(entries(chain(1, 1))) == [None]
        await client.close()


async def test_a_path_where_nobody_listens_is_named_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A wrong path would else cost every hit, and nothing would say so."""
    client = await attach(str(tmp_path / "nowhere.sock"))
    assert not client.attached
    await asyncio.sleep(0.2)  # it tries again and again
    told = [record.getMessage() for record in caplog.records]
    assert told == [f"there is no store at {tmp_path}/nowhere.sock yet: every look-up misses until there is"]
    await client.close()


async def test_a_refusal_reaches_the_caller_of_attach(node: NodeProcess, client: StoreClient) -> None:
    with pytest.raises(Unavailable, match="another model"):
        await StoreClient.attach(node.socket, fingerprint=bytes(16), block_bytes=BLOCK_BYTES, owner="other")


async def test_a_node_that_serves_already_keeps_its_socket(node: NodeProcess, client: StoreClient) -> None:
    with pytest.raises(RuntimeError, match="another store node listens"):
        start_node(Path(node.socket).parent)
