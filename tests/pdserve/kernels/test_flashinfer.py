"""Our side of FlashInfer: plans, views and index lists are right, and every call fits the real library's signatures."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pdserve.kernels.base import AttentionKind, Batch, Kernels
from pdserve.kernels.flashinfer import FlashInferKernels, _missing_to_build
from pdserve.kernels.paging import pages_of
from pdserve.kernels.reference import ReferenceKernels
from pdserve.kernels.scattered import scattered_batch
from pdserve.kernels.sdpa import SdpaKernels
from pdserve.models.rope import rope_table
from pdserve.models.rope_config import Rope
from tests.support.fake_flashinfer import Call, FakeFlashInfer

LIBRARY = Path(__file__).parents[3] / ".tools" / "flashinfer"
BLOCK, KV_HEADS, HEADS, DIM, LAYERS = 4, 2, 6, 32, 3
MIXED = ((0, 1), (7, 1), (0, 9), (8, 4), (3, 6))  # tokens already there, tokens of this step
DECODE = ((0, 1), (7, 1), (16, 1), (3, 1))


def make_batch(chunks: tuple[tuple[int, int], ...]) -> tuple[Batch, Tensor]:
    """Scattered blocks, and a pool of noise over them."""
    batch, num_blocks = scattered_batch(chunks, BLOCK)
    return batch, torch.randn(num_blocks, KV_HEADS, LAYERS, 2, BLOCK, DIM)


def run(kernels: Kernels, chunks: tuple[tuple[int, int], ...], **limits: Any) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    batch, pool = make_batch(chunks)
    qkv = torch.randn(len(batch.positions), (HEADS + 2 * KV_HEADS) * DIM)
    if isinstance(kernels, FlashInferKernels):
        batch = kernels.plan(batch, pool, qkv.dtype)
    angles = torch.rand(64, 12)
    kernels.rope_append(qkv, torch.cat((angles.cos(), angles.sin()), dim=1), batch, pool, 1, HEADS)
    return kernels.attention(qkv, batch, pool, 1, AttentionKind(HEADS, DIM**-0.5, **limits)), qkv, pool


@pytest.fixture(scope="module")
def kernels() -> FlashInferKernels:
    return FlashInferKernels(FakeFlashInfer(), torch.device("cpu"))


@pytest.mark.parametrize("chunks", [MIXED, DECODE], ids=["mixed", "decode"])
@pytest.mark.parametrize("limits", [{}, {"window": 5}, {"window": 3, "softcap": 2.0}], ids=str)
def test_attention_reads_what_was_appended(
    kernels: FlashInferKernels, chunks: tuple[tuple[int, int], ...], limits: dict[str, Any]
) -> None:
    for got, expected in zip(run(kernels, chunks, **limits), run(ReferenceKernels(), chunks, **limits), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("limits", [{}, {"window": 5}, {"window": 3, "softcap": 2.0}], ids=str)
def test_the_fallback_attends_as_the_reference(limits: dict[str, Any]) -> None:
    for got, expected in zip(
        run(SdpaKernels(), MIXED, **limits), run(ReferenceKernels(), MIXED, **limits), strict=True
    ):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_norms(kernels: FlashInferKernels, offset: float) -> None:
    truth, generator = ReferenceKernels(), torch.Generator().manual_seed(0)
    x, residual, weight = (torch.randn(*shape, generator=generator) for shape in ((5, 96), (5, 96), (96,)))
    torch.testing.assert_close(kernels.rms_norm(x, weight, 1e-5, offset), truth.rms_norm(x, weight, 1e-5, offset))
    for count in (1, 2):
        pair = [x.clone(), x.clone()]
        for each, one in zip((kernels, truth), pair, strict=True):
            each.norm_slices(one, 32, count, weight[:32].contiguous(), 1e-5, offset)
        torch.testing.assert_close(*pair)
    expected_residual = residual.clone()
    expected = truth.add_rms_norm(x, expected_residual, weight, 1e-5, offset)
    torch.testing.assert_close(kernels.add_rms_norm(x, residual, weight, 1e-5, offset), expected)
    torch.testing.assert_close(residual, expected_residual)


def test_an_offset_that_the_library_lacks_is_refused(kernels: FlashInferKernels) -> None:
    with pytest.raises(ValueError, match="0 or 1"):
        kernels.rms_norm(torch.ones(1, 8), torch.ones(8), 1e-5, 0.5)


def test_a_pool_in_eight_bits_gets_clamped_numbers(kernels: FlashInferKernels) -> None:
    batch, pool = make_batch(DECODE)
    pool = torch.zeros(pool.shape).to(torch.float8_e4m3fn)
    qkv = torch.full((len(DECODE), (HEADS + 2 * KV_HEADS) * DIM), 1e4)
    planned = kernels.plan(batch, pool, qkv.dtype)
    kernels.rope_append(qkv, torch.empty(64, 0), planned, pool, 0, HEADS)
    assert pool.float().max() == 448.0
    assert not pool.float().isnan().any()


def test_a_frame_keeps_the_addresses_of_its_batches(kernels: FlashInferKernels) -> None:
    frame = kernels.frame(4, max_blocks=32)
    addresses = []
    for chunks in (DECODE, ((9, 1), (2, 1), (2, 1), (30, 1))):
        batch, pool = make_batch(chunks)
        planned = kernels.plan(batch, pool, torch.float32, frame)
        tensors = (planned.positions, planned.page_indptr, planned.page_indices, planned.last_page_len)
        addresses.append([tensor.data_ptr() for tensor in tensors])
        assert planned.positions.tolist() == batch.positions.tolist()
        blocks = pages_of(batch, BLOCK).indices.tolist()
        assert planned.page_indices[: len(blocks)].tolist() == blocks
    assert addresses[0] == addresses[1]


# --- the real library's signatures -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def library() -> Iterator[Any]:
    """`make flashinfer` unpacks it; it needs no GPU to be imported."""
    if not LIBRARY.is_dir():
        if os.environ.get("CI") == "true":
            pytest.fail("run make flashinfer")
        pytest.skip("run make flashinfer")
    sys.path.insert(0, str(LIBRARY))
    try:
        yield importlib.import_module("flashinfer")
    finally:
        sys.path.remove(str(LIBRARY))


ROTATIONS = [
    Rope(1e4, DIM),
    Rope(5e5, DIM, "llama3", factor=8.0, original_max_positions=16),
    Rope(1e4, DIM, "yarn", factor=4.0, amplitude=1.14, original_max_positions=16),
    Rope(1e4, DIM // 2),  # the first half of a head
]


@pytest.mark.parametrize("rope", ROTATIONS, ids=lambda rope: f"{rope.kind} {rope.dim}")
def test_every_kind_of_rotation_is_one_call(rope: Rope) -> None:
    batch, pool = make_batch(MIXED)
    qkv, table = torch.randn(len(batch.positions), (HEADS + 2 * KV_HEADS) * DIM), rope_table(rope, 64)
    expected_qkv, expected_pool = qkv.clone(), pool.clone()
    ReferenceKernels().rope_append(expected_qkv, table, batch, expected_pool, 2, HEADS)
    fake = FakeFlashInfer()
    kernels = FlashInferKernels(fake, torch.device("cpu"))
    kernels.rope_append(qkv, table, kernels.plan(batch, pool, qkv.dtype), pool, 2, HEADS)
    assert [call.name for call in fake.calls] == ["apply_rope_with_cos_sin_cache_inplace", "append_paged_kv_cache"]
    torch.testing.assert_close((qkv, pool), (expected_qkv, expected_pool))


def signature(library: Any, call: Call) -> inspect.Signature:
    if not call.owner:
        return inspect.signature(getattr(library, call.name))
    owner = getattr(library, call.owner)
    # Where `plan` takes any keyword, what it hands them to does not.
    name = "_plan_impl" if call.name == "plan" and hasattr(owner, "_plan_impl") else call.name
    return inspect.signature(getattr(owner, name))


@pytest.mark.filterwarnings("ignore")
def test_every_call_binds_to_the_real_signatures(library: Any) -> None:
    fake = FakeFlashInfer()
    kernels = FlashInferKernels(fake, torch.device("cpu"))
    for chunks in (MIXED, DECODE):
        run(kernels, chunks, window=5, softcap=2.0)
        run(kernels, chunks)
    batch, pool = make_batch(DECODE)
    kernels.plan(batch, pool, torch.float32, kernels.frame(len(DECODE), 32))
    test_norms(kernels, 0.0)
    test_norms(kernels, 1.0)
    kernels.silu_and_mul(torch.ones(2, 8))
    kernels.gelu_and_mul(torch.ones(2, 8))
    assert len({(call.owner, call.name) for call in fake.calls}) == 14
    for call in fake.calls:
        args = (None, *call.args) if call.owner else call.args
        bound = signature(library, call).bind(*args, **call.kwargs)
        assert not set(bound.arguments) & {"args", "kwargs", "deprecated_positional_args"}, call
        if call.name == "plan":  # float16 by default, whatever q and the pool are
            assert {"q_data_type", "kv_data_type", "sm_scale", "window_left"} <= set(bound.arguments)
        if call.owner == "BatchDecodeWithPagedKVCacheWrapper" and call.name == "__init__":
            assert (bound.arguments["use_tensor_cores"], bound.arguments["backend"]) == (True, "fa2")  # any group


@pytest.mark.filterwarnings("ignore")
def test_what_we_leave_to_the_library_is_as_we_take_it(library: Any) -> None:
    rope = inspect.signature(library.apply_rope_with_cos_sin_cache_inplace).parameters
    assert rope["is_neox"].default is True  # halves, as Llama
    plans = (library.BatchDecodeWithPagedKVCacheWrapper._plan_impl, library.BatchPrefillWithPagedKVCacheWrapper.plan)
    for plan in plans:
        defaults = inspect.signature(plan).parameters
        assert defaults["pos_encoding_mode"].default == "NONE"
        assert defaults["disable_split_kv"].default is False
        assert defaults["o_data_type"].default is None  # that of q


def test_a_machine_that_cannot_compile_is_told_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def put(path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(0o755)

    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    missing = partial(_missing_to_build, tmp_path / "flashinfer")
    assert missing() == "nvcc (set CUDA_HOME)"
    put(tmp_path / "cuda/bin/nvcc")
    assert missing() == "ninja"
    put(tmp_path / "bin/ninja")
    assert missing() is None
    monkeypatch.setenv("PATH", "")
    put(tmp_path / "flashinfer/data/aot/decode/decode.so")
    assert missing() is None
