"""Every kernel implementation agrees with float64 arithmetic written out here, and touches no byte but its own."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from pdserve.kernels.base import AttentionKind, Batch, Kernels
from pdserve.kernels.reference import ReferenceKernels

# Absolute and relative: bfloat16 has 8 bits of mantissa, and outputs here are of the order of 1.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1.6e-2}
DTYPES = [torch.float32, torch.bfloat16]
BLOCK_SIZES = [1, 4, 8, 16, 32]
GARBAGE = 2**31 - 1  # a block id that no pool has: reading it is a crash
LAYERS, LAYER = 3, 1

FloatArray = np.ndarray[tuple[int, ...], np.dtype[np.float64]]


@pytest.fixture(params=["reference", "native"], scope="module")
def kernels(request: pytest.FixtureRequest) -> Kernels:
    if request.param == "reference":
        return ReferenceKernels()
    if shutil.which("g++") is None:
        pytest.skip("the native kernels need g++")
    from pdserve.kernels import native

    return native.load()


@dataclass(frozen=True)
class Heads:
    query: int
    kv: int
    dim: int


@dataclass(frozen=True)
class Case:
    """A pool and a batch over it; `chunks` are (tokens already in the cache, tokens of this step) of each sequence."""

    chunks: tuple[tuple[int, int], ...]
    block_size: int
    heads: Heads
    batch: Batch
    pool: Tensor
    qkv: Tensor


MIXED = ((0, 1), (37, 1), (0, 23), (16, 16), (31, 33), (64, 1), (5, 3))


def make_case(
    chunks: tuple[tuple[int, int], ...],
    block_size: int,
    heads: Heads,
    dtype: torch.dtype,
    shared_blocks: int = 0,
) -> Case:
    """Scattered blocks in a pool of NaN: only what a sequence may read is a number, only its blocks have an id.

    The first `shared_blocks` blocks of all sequences are the same ones, as with a common prefix.
    """
    rng = torch.Generator().manual_seed(len(chunks) * 1000 + block_size * 10 + heads.dim)
    counts = [-(-(cached + tokens) // block_size) for cached, tokens in chunks]
    free = torch.randperm(sum(counts) + 5, generator=rng).tolist()
    shared = [free.pop() for _ in range(shared_blocks)]
    tables = torch.full((len(chunks), max(counts) + 2), GARBAGE, dtype=torch.int32)
    pool = torch.full((sum(counts) + 5, heads.kv, LAYERS, 2, block_size, heads.dim), float("nan"), dtype=dtype)
    for s, (cached, tokens) in enumerate(chunks):
        blocks = shared[: counts[s]]
        blocks += [free.pop() for _ in range(counts[s] - len(blocks))]
        tables[s, : counts[s]] = torch.tensor(blocks, dtype=torch.int32)
        for position in range(cached + tokens):
            shape = (heads.kv, LAYERS, 2, heads.dim)
            pool[blocks[position // block_size], :, :, :, position % block_size] = torch.randn(shape, generator=rng).to(
                dtype
            )
    batch = Batch(
        positions=torch.tensor([p for cached, tokens in chunks for p in range(cached, cached + tokens)]).int(),
        query_start=torch.tensor([0, *(tokens for _, tokens in chunks)]).cumsum(0).int(),
        context_len=torch.tensor([cached + tokens for cached, tokens in chunks]).int(),
        block_tables=tables,
        max_query_len=max(tokens for _, tokens in chunks),
    )
    width = (heads.query + 2 * heads.kv) * heads.dim
    qkv = torch.randn(len(batch.positions), width, generator=rng).to(dtype)
    return Case(chunks, block_size, heads, batch, pool, qkv)


def exact(tensor: Tensor) -> FloatArray:
    return tensor.double().numpy()


def assert_near(got: Tensor, expected: FloatArray, dtype: torch.dtype, extra: float = 0.0) -> None:
    assert got.dtype == dtype
    bound = TOLERANCE[dtype] + extra
    torch.testing.assert_close(got.double(), torch.from_numpy(expected), atol=bound, rtol=bound, check_stride=False)


def raw(tensor: Tensor) -> Tensor:
    """The bytes: NaN equals itself."""
    return tensor.contiguous().view(torch.uint8)


def expected_attention(case: Case, scale: float, window: int, softcap: float) -> FloatArray:
    """One query row and one head at a time, in float64."""
    heads, pool = case.heads, exact(case.pool)
    q = exact(case.qkv).reshape(len(case.qkv), -1, heads.dim)
    out = np.empty((len(case.qkv), heads.query, heads.dim))
    row = 0
    for table, (cached, tokens) in zip(case.batch.block_tables.tolist(), case.chunks, strict=True):
        for position in range(cached, cached + tokens):
            first = max(position - window + 1, 0) if window else 0
            for head in range(heads.query):
                kv_head = head // (heads.query // heads.kv)
                cells = [(table[p // case.block_size], p % case.block_size) for p in range(first, position + 1)]
                keys = np.array([pool[block, kv_head, LAYER, 0, slot] for block, slot in cells])
                values = np.array([pool[block, kv_head, LAYER, 1, slot] for block, slot in cells])
                scores = keys @ q[row, head] * scale
                if softcap:
                    scores = softcap * np.tanh(scores / softcap)
                weights = np.exp(scores - scores.max())
                out[row, head] = weights @ values / weights.sum()
            row += 1
    return out.reshape(len(case.qkv), -1)


def check_attention(
    kernels: Kernels, case: Case, scale: float | None = None, window: int = 0, softcap: float = 0.0
) -> None:
    scale = case.heads.dim**-0.5 if scale is None else scale
    pool_before, qkv_before = case.pool.clone(), case.qkv.clone()
    got = kernels.attention(
        case.qkv, case.batch, case.pool, LAYER, AttentionKind(case.heads.query, scale, window, softcap)
    )
    assert got.shape == (len(case.qkv), case.heads.query * case.heads.dim)
    # Scores are held in float32: what their rounding does to the weights grows with them.
    extra = 1e-6 * scale * case.heads.dim**0.5
    assert_near(got, expected_attention(case, scale, window, softcap), case.qkv.dtype, extra)
    assert torch.equal(raw(case.pool), raw(pool_before))
    assert torch.equal(raw(case.qkv), raw(qkv_before))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [32, 64, 96, 128, 256])
@pytest.mark.parametrize(("query", "kv"), [(2, 2), (3, 1), (9, 3), (8, 2), (8, 1)])
def test_attention_over_head_shapes(kernels: Kernels, query: int, kv: int, dim: int, dtype: torch.dtype) -> None:
    block_size = BLOCK_SIZES[(query + kv + dim // 32) % len(BLOCK_SIZES)]
    check_attention(kernels, make_case(MIXED, block_size, Heads(query, kv, dim), dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_attention_at_block_boundaries(kernels: Kernels, block_size: int, dtype: torch.dtype) -> None:
    edges = [(max(k * block_size + d, 0), tokens) for k in (0, 1, 2) for d in (-1, 0, 1) for tokens in (1, block_size)]
    check_attention(kernels, make_case(tuple(edges), block_size, Heads(6, 2, 32), dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_over_shared_prefix_blocks(kernels: Kernels, dtype: torch.dtype) -> None:
    chunks = ((32, 1), (40, 7), (33, 20), (47, 1))
    check_attention(kernels, make_case(chunks, 8, Heads(9, 3, 64), dtype, shared_blocks=4))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("chunks", [((2999, 1),), ((1500, 3), (2047, 1), (0, 1)), ((0, 300),)], ids=str)
def test_attention_over_long_contexts(
    kernels: Kernels, chunks: tuple[tuple[int, int], ...], dtype: torch.dtype
) -> None:
    check_attention(kernels, make_case(chunks, 16, Heads(3, 1, 64), dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_of_a_wide_decode_batch(kernels: Kernels, dtype: torch.dtype) -> None:
    chunks = tuple((7 * i % 61, 1) for i in range(40))
    check_attention(kernels, make_case(chunks, 16, Heads(9, 3, 64), dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [1e-4, 40.0])
def test_attention_neither_overflows_nor_flattens(kernels: Kernels, scale: float, dtype: torch.dtype) -> None:
    """Scores up to a thousand: only a softmax that subtracts the maximum survives them."""
    check_attention(kernels, make_case(MIXED, 16, Heads(4, 2, 64), dtype), scale)


WINDOWED = ((0, 1), (37, 1), (0, 130), (200, 45), (199, 1), (64, 64), (63, 2), (127, 1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", [1, 2, 17, 63, 64, 65, 128, 2**31 - 1])
@pytest.mark.parametrize(("block_size", "dim"), [(1, 32), (4, 64), (16, 64), (16, 96), (32, 128), (16, 256)])
def test_attention_in_a_window(kernels: Kernels, window: int, block_size: int, dim: int, dtype: torch.dtype) -> None:
    """Shorter than the context, than a tile and than a chunk, and longer than all of them."""
    check_attention(kernels, make_case(WINDOWED, block_size, Heads(6, 2, dim), dtype), window=window)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", [0, 40])
@pytest.mark.parametrize(("softcap", "scale"), [(50.0, 0.125), (1.0, 1.0), (30.0, 40.0)])
def test_attention_with_capped_scores(
    kernels: Kernels, softcap: float, scale: float, window: int, dtype: torch.dtype
) -> None:
    """Barely capped, and so much that most scores are at the cap."""
    check_attention(kernels, make_case(WINDOWED, 16, Heads(4, 2, 64), dtype), scale, window, softcap)


def expected_rotation(x: FloatArray, table: FloatArray) -> FloatArray:
    """x [D] at the position whose cosines and sines are `table` [R]; what lies behind the first R stays."""
    half = len(table) // 2
    out = x.copy()
    for i in range(half):
        cos, sin = table[i], table[half + i]
        out[i] = x[i] * cos - x[i + half] * sin
        out[i + half] = x[i + half] * cos + x[i] * sin
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("block_size", "query", "kv", "dim", "rotary"),
    [
        (1, 3, 1, 32, 32),
        (4, 2, 2, 64, 64),
        (8, 8, 2, 96, 96),
        (16, 9, 3, 64, 48),
        (32, 8, 1, 128, 0),
        (16, 2, 1, 32, 2),
    ],
)
def test_rope_append(
    kernels: Kernels, block_size: int, query: int, kv: int, dim: int, rotary: int, dtype: torch.dtype
) -> None:
    """q and k are rotated in place, k and v land in their slots, and no other byte changes anywhere."""
    case = make_case(MIXED, block_size, Heads(query, kv, dim), dtype)
    angles = torch.outer(torch.arange(65.0), 10_000.0 ** -(torch.arange(0, rotary, 2) / max(rotary, 1)))
    cos_sin = torch.cat((angles.cos(), angles.sin()), dim=1)  # MIXED ends at position 64, the table's last
    before = exact(case.qkv).reshape(len(case.qkv), -1, dim)
    pool_before, v_before = case.pool.clone(), case.qkv.clone()[:, (query + kv) * dim :]

    kernels.rope_append(case.qkv, cos_sin, case.batch, case.pool, LAYER, query)

    table = exact(cos_sin)[case.batch.positions]
    expected = [[expected_rotation(head, table[t]) for head in row[: query + kv]] for t, row in enumerate(before)]
    rotated = case.qkv[:, : (query + kv) * dim]
    assert_near(rotated, np.array(expected).reshape(len(before), -1), dtype)
    assert torch.equal(raw(case.qkv[:, (query + kv) * dim :]), raw(v_before))
    assert torch.equal(raw(case.pool), raw(appended(pool_before, case)))


def appended(pool: Tensor, case: Case) -> Tensor:
    """`pool` with the k and v that now stand in qkv copied to their slots, one token at a time."""
    heads = case.heads
    rows = case.qkv.view(len(case.qkv), -1, heads.dim)
    row = 0
    for table, (cached, tokens) in zip(case.batch.block_tables.tolist(), case.chunks, strict=True):
        for position in range(cached, cached + tokens):
            block, slot = table[position // case.block_size], position % case.block_size
            pool[block, :, LAYER, 0, slot] = rows[row, heads.query : heads.query + heads.kv]
            pool[block, :, LAYER, 1, slot] = rows[row, heads.query + heads.kv :]
            row += 1
    return pool


def expected_norm(x: FloatArray, weight: FloatArray, eps: float) -> FloatArray:
    rows = x.reshape(-1, x.shape[-1])
    return np.array([row / math.sqrt((row**2).mean() + eps) * weight for row in rows]).reshape(x.shape)


NORM_SHAPES: list[Sequence[int]] = [(1, 32), (7, 576), (64, 100), (3, 4096), (2, 3, 64)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", NORM_SHAPES, ids=str)
@pytest.mark.parametrize("magnitude", [1.0, 1e-3, 1e4])
def test_rms_norm(kernels: Kernels, shape: Sequence[int], magnitude: float, dtype: torch.dtype) -> None:
    rng = torch.Generator().manual_seed(0)
    x = (torch.randn(*shape, generator=rng) * magnitude).to(dtype)
    weight = (1.0 + 0.1 * torch.randn(shape[-1], generator=rng)).to(dtype)
    x_before = x.clone()
    got = kernels.rms_norm(x, weight, 1e-5)
    assert_near(got, expected_norm(exact(x), exact(weight), 1e-5), dtype)
    assert torch.equal(x, x_before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rms_norm_of_zeros_is_zero(kernels: Kernels, dtype: torch.dtype) -> None:
    got = kernels.rms_norm(torch.zeros(3, 64, dtype=dtype), torch.ones(64, dtype=dtype), 1e-6)
    assert torch.equal(got, torch.zeros(3, 64, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", NORM_SHAPES[:-1], ids=str)
def test_add_rms_norm(kernels: Kernels, shape: Sequence[int], dtype: torch.dtype) -> None:
    rng = torch.Generator().manual_seed(1)
    x, residual = (torch.randn(*shape, generator=rng).to(dtype) for _ in range(2))
    weight = (1.0 + 0.1 * torch.randn(shape[-1], generator=rng)).to(dtype)
    total, x_before = exact(x) + exact(residual), x.clone()
    got = kernels.add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(residual, torch.from_numpy(total).to(dtype))
    assert_near(got, expected_norm(total, exact(weight), 1e-5), dtype)
    assert torch.equal(x, x_before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_offset_is_added_to_the_weights_of_a_norm(kernels: Kernels, dtype: torch.dtype) -> None:
    """In float: 1 + 0.001 is no number of bfloat16."""
    rng = torch.Generator().manual_seed(1)
    x, residual = (torch.randn(5, 96, generator=rng).to(dtype) for _ in range(2))
    weight = (0.001 * torch.randn(96, generator=rng)).to(dtype)
    expected = expected_norm(exact(x), 1.0 + exact(weight), 1e-5)
    assert_near(kernels.rms_norm(x, weight, 1e-5, 1.0), expected, dtype)
    expected = expected_norm(exact(x) + exact(residual), 1.0 + exact(weight), 1e-5)
    assert_near(kernels.add_rms_norm(x, residual, weight, 1e-5, 1.0), expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("begin", "count", "size"), [(0, 3, 32), (64, 1, 64), (5, 2, 19), (0, 1, 128)])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_norm_slices(kernels: Kernels, begin: int, count: int, size: int, offset: float, dtype: torch.dtype) -> None:
    rng = torch.Generator().manual_seed(1)
    x, weight = torch.randn(7, 128, generator=rng).to(dtype), torch.randn(size, generator=rng).to(dtype)
    expected = exact(x).copy()
    for start in range(begin, begin + count * size, size):
        part = expected[:, start : start + size]
        part[:] = expected_norm(part, offset + exact(weight), 1e-5)
    kernels.norm_slices(x, begin, count, weight, 1e-5, offset)
    assert_near(x, expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "size"), [(1, 16), (5, 100), (33, 1536)])
def test_gelu_and_mul(kernels: Kernels, rows: int, size: int, dtype: torch.dtype) -> None:
    x = (3 * torch.randn(rows, 2 * size, generator=torch.Generator().manual_seed(2))).to(dtype)
    gate, up = np.split(exact(x), 2, axis=1)
    gelu = 0.5 * gate * (1 + np.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)))
    assert_near(kernels.gelu_and_mul(x), gelu * up, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "size"), [(1, 16), (5, 100), (33, 1536)])
def test_silu_and_mul(kernels: Kernels, rows: int, size: int, dtype: torch.dtype) -> None:
    x = (3 * torch.randn(rows, 2 * size, generator=torch.Generator().manual_seed(2))).to(dtype)
    gate, up = np.split(exact(x), 2, axis=1)
    assert_near(kernels.silu_and_mul(x), gate / (1 + np.exp(-gate)) * up, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["silu_and_mul", "gelu_and_mul"])
def test_an_activation_of_extremes_is_finite(kernels: Kernels, name: str, dtype: torch.dtype) -> None:
    gate = torch.tensor([-1e30, -1e4, -200.0, -88.0, 0.0, 88.0, 200.0, 1e4, 1e30] * 5, dtype=dtype)
    got = getattr(kernels, name)(torch.cat((gate, torch.ones_like(gate))).unsqueeze(0))
    torch.testing.assert_close(got[0], gate.clamp(min=0.0))
