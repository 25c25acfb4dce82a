"""A key names the tokens of a block, all tokens before it, and whose they are: nothing else gives the same key."""

from __future__ import annotations

from array import array
from hashlib import blake2b

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.keys import KEY_BYTES, block_keys, root_key

ROOT = root_key(b"fingerprint", b"salt", "adapter")
TOKENS = st.lists(st.integers(0, 2**32 - 1), max_size=40)


def test_golden_keys_never_change() -> None:
    """Keys outlive a process: on disk, in the index, and between workers of different versions."""
    assert root_key(b"fingerprint").hex() == "7dcac31bdcc9bfca5314ddfa8c5833d5"
    assert ROOT.hex() == "60253e1a3539dc90de6aa06004324de0"
    keys = block_keys(ROOT, [0, 1, 2**32 - 1, 49151], 2)
    assert [key.hex() for key in keys] == ["d49fac9d1138c3b21f7d4513064a8f51", "4fc5de732558c5a6d29013e885c0b69a"]


def test_key_is_the_documented_hash() -> None:
    def field(value: bytes) -> bytes:
        return len(value).to_bytes(8, "little") + value

    def hashed(*fields: bytes) -> bytes:
        return blake2b(b"".join(map(field, fields)), digest_size=KEY_BYTES).digest()

    assert hashed(b"root", b"fingerprint", b"salt", b"adapter") == ROOT
    first = hashed(b"block", ROOT, b"\x01\0\0\0\x02\0\0\0")
    assert block_keys(ROOT, [1, 2, 3, 4], 2) == [first, hashed(b"block", first, b"\x03\0\0\0\x04\0\0\0")]


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ((b"ab", b"c", "d"), (b"a", b"bc", "d")),
        ((b"a", b"bc", "d"), (b"a", b"b", "cd")),
        ((b"a", b"", "b"), (b"a", b"b", "")),
        ((b"", b"a", ""), (b"a", b"", "")),
        ((b"a", b"\0", ""), (b"a", b"", "\0")),
        ((b"a", b"\0", ""), (b"a", b"\0\0", "")),
    ],
)
def test_fields_do_not_run_into_each_other(left: tuple[bytes, bytes, str], right: tuple[bytes, bytes, str]) -> None:
    assert root_key(*left) != root_key(*right)


def test_tenants_share_no_key() -> None:
    tokens = range(64)
    one, two = (set(block_keys(root_key(b"f", salt), tokens, 4)) for salt in (b"one", b"two"))
    assert len(one) == len(two) == 16
    assert one.isdisjoint(two)


def test_block_sizes_share_no_key() -> None:
    assert set(block_keys(ROOT, [0] * 64, 4)).isdisjoint(block_keys(ROOT, [0] * 64, 8))


@given(TOKENS, TOKENS, st.integers(1, 6))
def test_keys_are_equal_exactly_as_far_as_whole_blocks_are(left: list[int], right: list[int], size: int) -> None:
    pairs = zip(block_keys(ROOT, left, size), block_keys(ROOT, right, size), strict=False)
    for count, (one, two) in enumerate(pairs, start=1):
        assert (one == two) == (left[: count * size] == right[: count * size])


@given(TOKENS, st.integers(1, 6), st.integers(0, 6))
def test_chain_goes_on_from_any_of_its_keys(tokens: list[int], size: int, cut: int) -> None:
    keys = block_keys(ROOT, tokens, size)
    cut = min(cut, len(keys))
    parent = keys[cut - 1] if cut else ROOT
    assert block_keys(parent, tokens[cut * size :], size) == keys[cut:]


@given(TOKENS, st.integers(1, 6))
def test_one_key_of_16_bytes_a_full_block_whatever_carries_the_tokens(tokens: list[int], size: int) -> None:
    keys = block_keys(ROOT, tokens, size)
    assert len(keys) == len(tokens) // size
    assert all(len(key) == KEY_BYTES for key in keys)
    assert keys == block_keys(ROOT, tuple(tokens), size) == block_keys(ROOT, array("I", tokens), size)
    assert keys == block_keys(ROOT, array("q", tokens), size)


@pytest.mark.parametrize("size", [0, -1])
def test_block_size_must_be_positive(size: int) -> None:
    with pytest.raises(ValueError, match="block_size must be positive"):
        block_keys(ROOT, [1], size)


@pytest.mark.parametrize("token", [-1, 2**32, 2**70])
def test_token_id_out_of_range_is_refused(token: int) -> None:
    with pytest.raises(ValueError, match="token ids must lie in"):
        block_keys(ROOT, [1, token], 2)
