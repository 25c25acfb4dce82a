"""A key names the tokens of a block, all tokens before it, and whose they are: nothing else gives the same key."""

from __future__ import annotations

from array import array
from hashlib import blake2b
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.keys import GROUP_BLOCKS, KEY_BYTES, KeyChain, block_keys, root_key

ROOT = root_key(b"fingerprint", b"salt", "adapter")
TOKENS = st.lists(st.integers(0, 2**32 - 1), max_size=100)


def test_golden_keys_never_change() -> None:
    """Keys outlive a process: on disk, in the index, and between workers of different versions."""
    assert root_key(b"fingerprint").hex() == "7dcac31bdcc9bfca5314ddfa8c5833d5"
    assert ROOT.hex() == "60253e1a3539dc90de6aa06004324de0"
    keys = block_keys(ROOT, [0, 1, 2**32 - 1, 49151], 2)
    assert [key.hex() for key in keys] == ["3ef69d0c8d0fd3b69ae895148e017af0", "9a74bcb8415ba5bfd47cf016ae0a29df"]
    assert block_keys(ROOT, range(40), 1)[-1].hex() == "dcb7c834b7d4c622d22e6ff45a87e1be"


def test_key_is_the_documented_hash() -> None:
    def field(value: bytes) -> bytes:
        return len(value).to_bytes(8, "little") + value

    def hashed(*fields: bytes, rest: bytes = b"") -> bytes:
        return blake2b(b"".join(map(field, fields)) + rest, digest_size=KEY_BYTES).digest()

    def block(parent: bytes, tokens: range) -> bytes:
        data = array("I", tokens).tobytes()
        return hashed(b"blocks", parent, rest=(8).to_bytes(8, "little") + data)

    assert hashed(b"root", b"fingerprint", b"salt", b"adapter") == ROOT
    keys = block_keys(ROOT, range(2 * (GROUP_BLOCKS + 2)), 2)
    assert keys[:2] == [block(ROOT, range(2)), block(ROOT, range(4))]
    assert keys[GROUP_BLOCKS - 1] == block(ROOT, range(2 * GROUP_BLOCKS))
    assert keys[-1] == block(keys[GROUP_BLOCKS - 1], range(2 * GROUP_BLOCKS, 2 * GROUP_BLOCKS + 4))


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


@given(TOKENS, st.integers(1, 2), st.integers(0, 2))
def test_chain_goes_on_from_the_end_of_any_group(tokens: list[int], size: int, groups: int) -> None:
    keys = block_keys(ROOT, tokens, size)
    cut = min(groups, len(keys) // GROUP_BLOCKS) * GROUP_BLOCKS
    parent = keys[cut - 1] if cut else ROOT
    assert block_keys(parent, tokens[cut * size :], size) == keys[cut:]


@given(TOKENS, st.integers(1, 3), st.randoms(use_true_random=False))
def test_a_lazy_chain_has_the_same_keys_in_whatever_order_they_are_asked_for(
    tokens: list[int], size: int, order: Random
) -> None:
    keys, chain = block_keys(ROOT, tokens, size), KeyChain(ROOT, tokens, size)
    assert len(chain) == len(keys)
    places = list(range(-len(keys), len(keys)))
    order.shuffle(places)
    assert all(chain[place] == keys[place] for place in places)
    assert chain[:] == list(chain) == keys
    for outside in (len(keys), -len(keys) - 1):
        with pytest.raises(IndexError):
            chain[outside]


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
