"""Frames and messages: however the bytes arrive the same frames come out, and no bytes do more than be refused."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.keys import BlockKey
from kvstore.store.frames import HEAD_BYTES, MAX_PAYLOAD_BYTES, BadFrame, Frame, FrameReader, Kind, encode_frame
from kvstore.store.messages import (
    MAX_OWNER_BYTES,
    MAX_TENANT_BYTES,
    NO_SLOT,
    TOLD,
    VERSION,
    Hello,
    LoadReply,
    Welcome,
    decode_begin,
    decode_commit,
    decode_count,
    decode_hold,
    decode_keys,
    decode_leases,
    decode_load,
    decode_refs,
    encode_begin,
    encode_commit,
    encode_count,
    encode_hold,
    encode_leases,
    encode_load,
    encode_refs,
)
from kvstore.store.wire import NO_PARENT

u32, u64 = st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)
keys = st.binary(min_size=16, max_size=16).map(BlockKey)
refs = st.tuples(st.integers(0, NO_SLOT - 1), u64)
frames = st.builds(Frame, st.sampled_from(Kind), u32, st.binary(max_size=300))
DECODERS: Sequence[Callable[[bytes], Any]] = (
    Hello.decode, Welcome.decode, LoadReply.decode, decode_begin, decode_commit, decode_count, decode_hold,
    decode_keys, decode_leases, decode_load, decode_refs,
)  # fmt: skip


@given(st.lists(frames, max_size=6), st.lists(st.integers(0, 2000), max_size=12))
def test_any_split_of_the_bytes_gives_the_same_frames(sent: list[Frame], cuts: list[int]) -> None:
    stream = b"".join(encode_frame(Kind(frame.kind), frame.call, frame.payload) for frame in sent)
    reader, found = FrameReader(), []
    ends = sorted(min(cut, len(stream)) for cut in cuts)
    for start, end in zip([0, *ends], [*ends, len(stream)], strict=True):
        found += reader.feed(stream[start:end])
    assert found == sent


def test_a_large_frame_that_comes_in_single_bytes_is_whole() -> None:
    payload = bytes(range(256)) * 8
    reader = FrameReader()
    parts = [reader.feed(bytes([byte])) for byte in encode_frame(Kind.REPLY, 9, payload)]
    assert parts[:-1] == [[]] * (len(parts) - 1)
    assert parts[-1] == [Frame(Kind.REPLY, 9, payload)]


@given(st.lists(st.binary(min_size=1, max_size=40), min_size=1, max_size=20))
def test_garbage_is_refused_or_waited_for_and_never_more_than_one_frame_is_kept(parts: list[bytes]) -> None:
    reader = FrameReader()
    with contextlib.suppress(BadFrame):
        for part in parts:
            reader.feed(part)
            assert len(reader._rest) <= HEAD_BYTES + MAX_PAYLOAD_BYTES


def test_a_frame_that_claims_too_much_is_refused_by_its_head() -> None:
    head = bytearray(encode_frame(Kind.LOAD, 1, b""))
    head[:4] = (MAX_PAYLOAD_BYTES + 1).to_bytes(4, "little")
    with pytest.raises(BadFrame):
        FrameReader().feed(bytes(head))
    reader = FrameReader()
    assert reader.feed(bytes(head[:7])) == []
    with pytest.raises(BadFrame):
        reader.feed(bytes(head[7:]))
    with pytest.raises(ValueError, match="at most"):
        encode_frame(Kind.LOAD, 1, bytes(MAX_PAYLOAD_BYTES + 1))


@given(st.binary(max_size=200))
def test_a_decoder_takes_any_bytes_or_says_what_is_wrong(data: bytes) -> None:
    for decode in DECODERS:
        with contextlib.suppress(BadFrame):
            decode(data)


@given(st.text(max_size=40), u64, st.binary(min_size=16, max_size=16), u64, st.lists(refs, max_size=5))
def test_hello_comes_out_as_it_went_in(
    owner: str, block_bytes: int, fingerprint: bytes, previous: int, writing: list[tuple[int, int]]
) -> None:
    hello = Hello(owner, block_bytes, fingerprint, previous, tuple(writing))
    assert Hello.decode(hello.encode()) == hello


def test_hello_of_another_version_is_told_which_one_is_spoken() -> None:
    data = bytearray(Hello("w", 1, bytes(16)).encode())
    data[4] += 1
    with pytest.raises(BadFrame, match=f"speaks version {VERSION} of the workers' protocol, not {VERSION + 1}"):
        Hello.decode(bytes(data))
    assert len(Hello("x" * 2000, 1, bytes(16)).encode()) < 600, "a long name is cut"
    assert len(Hello.decode(Hello("x" * 2000, 1, bytes(16)).encode()).owner) == MAX_OWNER_BYTES


@given(u64, u64, st.floats(allow_nan=False), u32, st.text(max_size=60), st.text(max_size=60), st.booleans())
def test_welcome_comes_out_as_it_went_in(
    session: int, life: int, lease_s: float, slots: int, path: str, address: str, shares: bool
) -> None:
    welcome = Welcome(session, life, lease_s, slots, path, address, shares)
    assert Welcome.decode(welcome.encode()) == welcome


@given(u64, st.lists(st.tuples(u32, u64, st.integers(0, 255)), max_size=9), st.floats(-1e9, 1e9), st.lists(keys))
def test_load_and_its_reply_come_out_as_they_went_in(
    lease: int, rows: list[tuple[int, int, int]], deadline_s: float, wanted: list[BlockKey]
) -> None:
    slots, checksums, tiers = [row[0] for row in rows], [row[1] for row in rows], bytes(row[2] for row in rows)
    reply = LoadReply(lease, slots, checksums, tiers)
    assert LoadReply.decode(reply.encode()) == reply
    assert decode_load(encode_load(deadline_s, wanted)) == (deadline_s, wanted)


@given(
    st.lists(st.tuples(keys, st.none() | keys.filter(NO_PARENT.__ne__))),
    st.text(max_size=20),
    st.lists(st.tuples(refs, u64)),
    st.lists(u64),
)
def test_saves_and_releases_come_out_as_they_went_in(
    entries: list[tuple[BlockKey, BlockKey | None]],
    tenant: str,
    saved: list[tuple[tuple[int, int], int]],
    leases: list[int],
) -> None:
    assert decode_begin(encode_begin(entries, tenant)) == (entries, tenant)
    written = [ref for ref, _ in saved]
    assert decode_commit(encode_commit(written, [checksum for _, checksum in saved])) == saved
    assert decode_refs(encode_refs([*written, None])) == [*written, (NO_SLOT, 0)]
    assert decode_leases(encode_leases(leases)) == leases


@given(st.integers(0, TOLD - 1), st.lists(keys), u64)
def test_told_leases_and_counts_come_out_as_they_went_in(lease: int, held: list[BlockKey], count: int) -> None:
    assert decode_hold(encode_hold(TOLD | lease, held)) == (TOLD | lease, held)
    with pytest.raises(BadFrame, match="the node's own"):
        decode_hold(encode_hold(lease, held))
    assert decode_count(encode_count(count)) == count


@pytest.mark.parametrize("deadline_s", [float("nan"), float("inf")])
def test_a_deadline_that_never_comes_is_refused(deadline_s: float) -> None:
    with pytest.raises(BadFrame, match="finite"):
        decode_load(encode_load(deadline_s, []))


def test_a_tenant_with_too_long_a_name_is_an_error_of_the_caller() -> None:
    with pytest.raises(ValueError, match="tenant's name"):
        encode_begin([], "x" * (MAX_TENANT_BYTES + 1))
