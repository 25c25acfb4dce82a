"""The native kernels refuse what would reach outside their memory, and compute the same with any number of threads."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pdserve.kernels.base import AttentionKind, Batch

if shutil.which("g++") is None:
    pytest.skip("the native kernels need g++", allow_module_level=True)

from pdserve.kernels.library import open_library
from pdserve.kernels.native import NativeKernels, load

HEADS, KV_HEADS, DIM, BLOCK_SIZE, BLOCKS, LAYERS = 6, 2, 64, 16, 24, 2
CONTEXTS, QUERIES = (200, 70, 1, 40), (1, 33, 1, 1)


@pytest.fixture(scope="module")
def kernels() -> NativeKernels:
    return load()


def make_batch() -> Batch:
    tables = torch.randperm(BLOCKS, generator=torch.Generator().manual_seed(0)).int()
    counts = [-(-context // BLOCK_SIZE) for context in CONTEXTS]
    block_tables = torch.zeros(len(CONTEXTS), max(counts), dtype=torch.int32)
    for row, count, start in zip(block_tables, counts, torch.tensor([0, *counts]).cumsum(0).tolist(), strict=False):
        row[:count] = tables[start : start + count]
    pairs = zip(CONTEXTS, QUERIES, strict=True)
    return Batch(
        positions=torch.cat([torch.arange(context - queries, context) for context, queries in pairs]).int(),
        query_start=torch.tensor([0, *QUERIES]).cumsum(0).int(),
        context_len=torch.tensor(CONTEXTS).int(),
        block_tables=block_tables,
        max_query_len=max(QUERIES),
    )


def make_pool(dtype: torch.dtype = torch.float32, dim: int = DIM) -> Tensor:
    shape = (BLOCKS, KV_HEADS, LAYERS, 2, BLOCK_SIZE, dim)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def make_qkv(dtype: torch.dtype = torch.float32) -> Tensor:
    shape = (sum(QUERIES), (HEADS + 2 * KV_HEADS) * DIM)
    return torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("threads", [2, 5, 16])
def test_more_threads_compute_the_same(kernels: NativeKernels, threads: int, dtype: torch.dtype) -> None:
    """More threads than (sequence, kv head) pairs split a context into parts, some of them empty."""
    many, batch, pool, qkv = NativeKernels(open_library(), threads), make_batch(), make_pool(dtype), make_qkv(dtype)
    bound = 1e-5 if dtype == torch.float32 else 1e-2
    for window in (0, 20):
        got, expected = (k.attention(qkv, batch, pool, 1, AttentionKind(HEADS, 0.125, window)) for k in (many, kernels))
        torch.testing.assert_close(got, expected, atol=bound, rtol=bound)

    x, weight = qkv[:, :96].contiguous(), torch.randn(96).to(dtype)
    assert torch.equal(many.rms_norm(x, weight, 1e-5), kernels.rms_norm(x, weight, 1e-5))
    assert torch.equal(many.silu_and_mul(x), kernels.silu_and_mul(x))
    wide = torch.randn(64, 96, generator=torch.Generator().manual_seed(3)).to(dtype)
    assert torch.equal(many.linear(x, wide), kernels.linear(x, wide))


def broken(**tensors: Tensor) -> Batch:
    return dataclasses.replace(make_batch(), **tensors)


@pytest.mark.parametrize(
    "batch",
    [
        broken(block_tables=torch.full((4, 13), BLOCKS, dtype=torch.int32)),
        broken(block_tables=torch.full((4, 13), -1, dtype=torch.int32)),
        broken(block_tables=make_batch().block_tables[:, :12].contiguous()),
        broken(block_tables=make_batch().block_tables[:3]),
        broken(block_tables=make_batch().block_tables.long()),
        broken(block_tables=make_batch().block_tables.t()),
        broken(context_len=torch.tensor([200, 32, 1, 40]).int()),
        broken(context_len=torch.tensor(CONTEXTS[:3]).int()),
        broken(query_start=torch.tensor([0, 1, 34, 35, 37]).int()),
        broken(query_start=torch.tensor([0, 34, 1, 35, 36]).int()),
    ],
    ids=["block", "negative", "columns", "rows", "int64", "strided", "context", "lengths", "tokens", "order"],
)
def test_a_batch_that_reaches_outside_is_refused(kernels: NativeKernels, batch: Batch) -> None:
    with pytest.raises(ValueError, match="batch"):
        kernels.attention(make_qkv(), batch, make_pool(), 0, AttentionKind(HEADS, 0.125))


def test_a_refused_batch_leaves_no_trace(kernels: NativeKernels) -> None:
    batch, pool, qkv = make_batch(), make_pool(), make_qkv()
    expected = kernels.attention(qkv, batch, pool, 0, AttentionKind(HEADS, 0.125))
    with pytest.raises(ValueError, match="batch"):
        kernels.attention(
            qkv, broken(block_tables=torch.full((4, 13), BLOCKS).int()), pool, 0, AttentionKind(HEADS, 0.125)
        )
    assert torch.equal(kernels.attention(qkv, batch, pool, 0, AttentionKind(HEADS, 0.125)), expected)


@pytest.mark.parametrize(
    "call",
    [
        lambda k: k.attention(make_qkv(), make_batch(), make_pool(dim=20), 0, AttentionKind(HEADS, 0.1)),
        lambda k: k.attention(make_qkv(), make_batch(), make_pool(torch.bfloat16), 0, AttentionKind(HEADS, 0.1)),
        lambda k: k.attention(make_qkv(torch.half), make_batch(), make_pool(torch.half), 0, AttentionKind(HEADS, 0.1)),
        lambda k: k.attention(make_qkv()[:-1], make_batch(), make_pool(), 0, AttentionKind(HEADS, 0.1)),
        lambda k: k.attention(make_qkv(), make_batch(), make_pool(), LAYERS, AttentionKind(HEADS, 0.1)),
        lambda k: k.attention(make_qkv(), make_batch(), make_pool(), 0, AttentionKind(HEADS - 2, 0.1)),
        lambda k: k.attention(make_qkv(), make_batch(), make_pool()[:, :, :, :1], 0, AttentionKind(HEADS, 0.1)),
        lambda k: k.rope_append(make_qkv(), torch.rand(199, DIM), make_batch(), make_pool(), 0, HEADS),
        lambda k: k.rope_append(make_qkv(), torch.rand(200, DIM).double(), make_batch(), make_pool(), 0, HEADS),
        lambda k: k.rms_norm(torch.rand(3, 64), torch.rand(32), 1e-5),
        lambda k: k.rms_norm(torch.rand(3, 64), torch.rand(64).bfloat16(), 1e-5),
        lambda k: k.add_rms_norm(torch.rand(3, 64), torch.rand(64, 3).t(), torch.rand(64), 1e-5),
        lambda k: k.norm_slices(torch.rand(3, 64), 1, 2, torch.rand(32), 1e-5),
        lambda k: k.norm_slices(torch.rand(3, 64), -1, 1, torch.rand(32), 1e-5),
        lambda k: k.norm_slices(torch.rand(64, 3).t(), 0, 1, torch.rand(32), 1e-5),
        lambda k: k.norm_slices(torch.rand(3, 64), 0, 1, torch.rand(32).bfloat16(), 1e-5),
        lambda k: k.rope_append(make_qkv(), torch.rand(200, DIM + 2), make_batch(), make_pool(), 0, HEADS),
        lambda k: k.rope_append(make_qkv(), torch.rand(200, 3), make_batch(), make_pool(), 0, HEADS),
        lambda k: k.silu_and_mul(torch.rand(3, 63)),
        lambda k: k.silu_and_mul(torch.rand(3, 64).half()),
    ],
)
def test_tensors_that_do_not_fit_are_refused(kernels: NativeKernels, call: Callable[[NativeKernels], object]) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        call(kernels)


def test_a_number_that_is_none_stays_visible(kernels: NativeKernels) -> None:
    """An overflow in the model must not come out as a number."""
    for dtype in (torch.float32, torch.bfloat16):
        qkv = make_qkv(dtype)
        qkv[0, :DIM] = float("nan")
        out = kernels.attention(qkv, make_batch(), make_pool(dtype), 0, AttentionKind(HEADS, 0.125))
        assert out[0, :DIM].isnan().all()
        assert not out[0, DIM:].isnan().any()
