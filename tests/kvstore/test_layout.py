"""A block is one contiguous range of bytes whose meaning the geometry and its fingerprint fix completely."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from kvstore.layout import ITEM_BYTES, BlockGeometry, KvDtype

GEOMETRY = BlockGeometry(block_size=16, num_layers=30, num_kv_heads=3, head_dim=64, dtype="bfloat16")


def test_block_of_the_default_model_has_360_kibibytes() -> None:
    assert GEOMETRY.block_bytes == 368_640
    assert GEOMETRY.shape == (3, 30, 2, 16, 64)


@pytest.mark.parametrize("dtype", list(ITEM_BYTES))
def test_bytes_are_those_of_the_shape(dtype: KvDtype) -> None:
    geometry = replace(GEOMETRY, dtype=dtype)
    assert geometry.block_bytes == int(np.prod(geometry.shape)) * ITEM_BYTES[dtype]


def test_shard_of_a_kv_head_is_one_contiguous_slice() -> None:
    geometry = BlockGeometry(4, num_layers=2, num_kv_heads=4, head_dim=2, dtype="float32")
    block = np.arange(geometry.block_bytes // 4).reshape(geometry.shape)
    half = block[2:].reshape(-1)
    assert np.array_equal(half, np.arange(half.size, 2 * half.size))


@pytest.mark.parametrize("name", ["block_size", "num_layers", "num_kv_heads", "head_dim"])
@pytest.mark.parametrize("value", [0, -1])
def test_sizes_must_be_positive(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{name} must be positive, got {value}"):
        replace(GEOMETRY, **{name: value})


def test_unknown_dtype_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="bfloat16, float32, fp8_e4m3, got 'float16'"):
        replace(GEOMETRY, dtype="float16")


def test_fingerprint_is_the_same_in_every_process() -> None:
    assert GEOMETRY.fingerprint("sha256:abc").hex() == "1a0d439f67e715dde94b143770d1cf79"


def test_fingerprint_differs_with_each_part() -> None:
    others = [
        replace(GEOMETRY, block_size=32),
        replace(GEOMETRY, num_layers=3),
        replace(GEOMETRY, num_kv_heads=30),
        replace(GEOMETRY, head_dim=6),
        replace(GEOMETRY, dtype="float32"),
        # Equal in bytes, not in meaning.
        replace(GEOMETRY, num_layers=3, num_kv_heads=30),
    ]
    prints = {geometry.fingerprint("model") for geometry in (GEOMETRY, *others)} | {GEOMETRY.fingerprint("model2")}
    assert len(prints) == len(others) + 2
    assert all(len(each) == 16 for each in prints)
