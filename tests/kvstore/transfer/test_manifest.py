"""A manifest survives the wire unchanged, and no damaged, foreign or malformed one is ever read."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.errors import TransferError
from kvstore.keys import KEY_BYTES, BlockKey
from kvstore.transfer.manifest import BlockSeal, Manifest, Subject, manifest_bytes
from kvstore.transfer.tags import MANIFEST, MAX_TICKET_ID, message_tag

u64 = st.integers(0, 2**64 - 1)
manifests = st.builds(
    Manifest,
    st.integers(0, MAX_TICKET_ID),
    st.binary(min_size=KEY_BYTES, max_size=KEY_BYTES).map(BlockKey),
    st.lists(st.builds(BlockSeal, u64, u64), max_size=8).map(tuple),
    st.lists(st.integers(0, 2**32 - 1), max_size=8).map(tuple),
)


def decode(data: bytes, like: Manifest) -> Manifest:
    subject = Subject(like.ticket_id, like.content, len(like.output_token_ids), vocab_size=2**32)
    return Manifest.decode(data, subject, len(like.seals))


@given(manifests)
def test_decode_is_the_inverse_of_encode(manifest: Manifest) -> None:
    data = manifest.encode()
    assert len(data) == manifest_bytes(len(manifest.seals), len(manifest.output_token_ids))
    assert decode(data, manifest) == manifest


@given(manifests, st.data())
def test_any_flipped_bit_is_refused(manifest: Manifest, data: st.DataObject) -> None:
    wire = bytearray(manifest.encode())
    wire[data.draw(st.integers(0, len(wire) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(TransferError):
        decode(bytes(wire), manifest)


@given(manifests, st.binary(max_size=200))
def test_arbitrary_bytes_are_refused(manifest: Manifest, data: bytes) -> None:
    with pytest.raises(TransferError):
        decode(data, manifest)


@given(manifests, manifests)
def test_manifest_of_another_ticket_is_refused(mine: Manifest, other: Manifest) -> None:
    shape = (mine.ticket_id, mine.content, len(mine.seals), len(mine.output_token_ids))
    if shape != (other.ticket_id, other.content, len(other.seals), len(other.output_token_ids)):
        with pytest.raises(TransferError):
            decode(other.encode(), mine)


def test_manifest_of_other_tokens_is_refused_though_every_count_is_right() -> None:
    mine, other = (Manifest(7, BlockKey(bytes([n]) * KEY_BYTES), (BlockSeal(1, 2),), (5,)) for n in (1, 2))
    with pytest.raises(TransferError, match="the KV of other tokens"):
        decode(other.encode(), mine)


@pytest.mark.parametrize("token_id", [49_152, 2**32 - 1])
def test_token_outside_the_vocabulary_is_refused(token_id: int) -> None:
    manifest = Manifest(7, BlockKey(bytes(KEY_BYTES)), (), (49_151, token_id))
    with pytest.raises(TransferError, match="outside the vocabulary of 49152"):
        Manifest.decode(manifest.encode(), Subject(7, manifest.content, num_tokens=2, vocab_size=49_152), 0)


def test_tag_holds_ticket_and_ordinal() -> None:
    assert message_tag(MAX_TICKET_ID, MANIFEST) == 2**64 - 1
    assert message_tag(3, 5) == 3 << 16 | 5


@pytest.mark.parametrize(("ticket_id", "ordinal"), [(-1, 0), (MAX_TICKET_ID + 1, 0), (0, -1), (0, MANIFEST + 1)])
def test_tag_out_of_range_is_refused(ticket_id: int, ordinal: int) -> None:
    with pytest.raises(ValueError, match="must lie in"):
        message_tag(ticket_id, ordinal)
