"""The kernels of FlashInfer (github.com/flashinfer-ai/flashinfer, arXiv 2501.01005) on NVIDIA GPUs.

The pool stays `[block, kv_head, layer, k|v, token, head_dim]`: a layer's K and V are views `[block, kv_head, token,
head_dim]`, FlashInfer's HND layout with strides of our own, which its fa2, fa3, decode and append kernels all accept as
long as K's and V's are equal. So a block is one run of bytes for the wire, and no kernel knows of it.

Attention is planned once a step on the host, for each kind of attention that the model has (one, or two with windows on
some layers), and runs once a layer:

    plan(batch on the host) ──> PlannedBatch ──> forward: rope_append, attention, ... layer by layer

FlashInfer's `plan` sends its numbers from pinned memory of its own: see `Staging`.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from pdserve.kernels.base import AttentionKind, Batch, Weight
from pdserve.kernels.paging import Pages, pages_of
from pdserve.kernels.staging import Staging

WORKSPACE_BYTES = 128 << 20  # of split attention, shared by all wrappers: they run one after the other
HEAD_DIMS = (64, 128, 256)
_LAYOUT = "HND"
_FP8 = torch.float8_e4m3fn


class FlashInferUnavailable(Exception):
    """FlashInfer is not installed or does not fit; the message is one sentence that says why."""


@dataclass(frozen=True, slots=True)
class PlannedBatch(Batch):
    """A batch on the device, with its plans; `block_tables` is empty, `page_*` stand for it."""

    sequence: Tensor  # [tokens] int32, whose each row is
    page_indptr: Tensor
    page_indices: Tensor
    last_page_len: Tensor
    host: Pages
    wrappers: dict[AttentionKind, Any]  # planned


@dataclass(slots=True)
class Frame:
    """Device memory at fixed addresses for decode batches of one size, as a captured graph reads it."""

    batch_size: int
    inputs: Tensor  # int32, all of a batch's tensors
    indices: Tensor  # int32, as many block ids as a batch may have
    wrappers: dict[AttentionKind, Any] = field(default_factory=dict)


class FlashInferKernels:
    """`pdserve.kernels.base.Kernels` for one stream of one GPU; its batches come from `plan`.

    Args:
        prefill: of FlashInfer's backends; `auto` is fa3 on Hopper, else fa2.
    """

    name = "flashinfer"

    def __init__(self, library: Any, device: torch.device, prefill: str = "auto") -> None:
        self._library = library
        self._prefill = prefill
        self._device = device
        self._staging = Staging(device)
        self._workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        self._kinds: dict[AttentionKind, None] = {}  # seen so far, in order
        self._decoders: dict[AttentionKind, Any] = {}  # wrappers outside of graphs
        self._prefillers: dict[AttentionKind, Any] = {}

    # --- once a step -------------------------------------------------------------------------------------------------

    def plan(self, batch: Batch, pool: Tensor, dtype: torch.dtype, frame: Frame | None = None) -> PlannedBatch:
        """Bring a batch of the host to the device and plan its attention; waits for nothing but the plan before.

        Args:
            dtype: of q.
            frame: put it there; the batch is a decode batch of the frame's size.
        """
        pages = pages_of(batch, pool.shape[4])
        arrays = [batch.positions.numpy(), pages.query_start, batch.context_len.numpy()]
        arrays += [pages.sequence, pages.indptr, pages.last_page_len, pages.indices]
        self._staging.wait()
        tensors = self._staging.upload(arrays, None if frame is None else frame.inputs)
        positions, query_start, context_len, sequence, indptr, last_page_len, indices = tensors
        if frame is not None:  # a graph reads as far as its plan says, not as far as this batch reaches
            indices = frame.inputs[sum(array.size for array in arrays[:-1]) :]
        planned = PlannedBatch(
            positions=positions,
            query_start=query_start,
            context_len=context_len,
            block_tables=indices.new_empty(len(context_len), 0),
            max_query_len=batch.max_query_len,
            sequence=sequence,
            page_indptr=indptr,
            page_indices=indices,
            last_page_len=last_page_len,
            host=pages,
            wrappers={},
        )
        for kind in self._kinds:
            self._plan_kind(planned, kind, pool, dtype, frame)
        self._staging.sent()
        return planned

    def frame(self, batch_size: int, max_blocks: int) -> Frame:
        """For decode batches of that size, with up to `max_blocks` blocks in all."""
        inputs = torch.zeros(6 * batch_size + 2 + max_blocks, dtype=torch.int32, device=self._device)
        return Frame(batch_size, inputs, torch.zeros(max_blocks, dtype=torch.int32, device=self._device))

    def _plan_kind(
        self, planned: PlannedBatch, kind: AttentionKind, pool: Tensor, dtype: torch.dtype, frame: Frame | None
    ) -> None:
        pages = planned.host
        indptr, last = torch.from_numpy(pages.indptr), torch.from_numpy(pages.last_page_len)
        shape = (kind.num_heads, pool.shape[1], pool.shape[5], pool.shape[4])
        options = {
            "sm_scale": kind.scale,
            "window_left": kind.window - 1 if kind.window else -1,
            "logits_soft_cap": kind.softcap or None,
            "q_data_type": dtype,  # float16 by default, whatever q is
            "kv_data_type": pool.dtype,
        }
        if planned.max_query_len == 1:
            wrapper = self._decoder(kind, frame)
            wrapper.plan(indptr, planned.page_indices[: len(pages.indices)], last, *shape, **options)
        else:
            wrapper = self._prefiller(kind)
            starts = torch.from_numpy(pages.query_start)
            wrapper.plan(starts, indptr, planned.page_indices, last, *shape, causal=True, **options)
        planned.wrappers[kind] = wrapper

    def _decoder(self, kind: AttentionKind, frame: Frame | None) -> Any:
        wrappers = self._decoders if frame is None else frame.wrappers
        if kind not in wrappers:
            buffers: dict[str, Any] = {}
            if frame is not None:
                size = frame.batch_size
                buffers = {
                    "use_cuda_graph": True,
                    "paged_kv_indptr_buffer": frame.inputs.new_zeros(size + 1),
                    "paged_kv_indices_buffer": frame.indices,
                    "paged_kv_last_page_len_buffer": frame.inputs.new_ones(size),
                }
            # With tensor cores any number of query heads a kv head is possible; named, as `auto` may take cuDNN's.
            make = self._library.BatchDecodeWithPagedKVCacheWrapper
            wrappers[kind] = make(self._workspace, _LAYOUT, use_tensor_cores=True, backend="fa2", **buffers)
        return wrappers[kind]

    def _prefiller(self, kind: AttentionKind) -> Any:
        if kind not in self._prefillers:
            make = self._library.BatchPrefillWithPagedKVCacheWrapper
            self._prefillers[kind] = make(self._workspace, _LAYOUT, backend=self._prefill)
        return self._prefillers[kind]

    # --- once a layer ------------------------------------------------------------------------------------------------

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
        norm = self._library.gemma_rmsnorm if _is_gemma(offset) else self._library.rmsnorm
        normed: Tensor = norm(x, weight, eps)
        return normed

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
        library = self._library
        norm = library.gemma_fused_add_rmsnorm if _is_gemma(offset) else library.fused_add_rmsnorm
        norm(x, residual, weight, eps)  # x becomes the norm: the decoder's are all temporary
        return x

    def norm_slices(self, x: Tensor, begin: int, count: int, weight: Tensor, eps: float, offset: float = 0.0) -> None:
        size = weight.shape[0]
        slices = x[:, begin : begin + count * size]
        if _is_gemma(offset):  # its kernel takes rows only
            rows = slices.reshape(-1, size)
            slices.copy_(self._library.gemma_rmsnorm(rows, weight, eps).view(slices.shape))
            return
        if count > 1:
            slices = slices.view(-1, count, size)
        self._library.rmsnorm(slices, weight, eps, out=slices)

    def rope_append(self, qkv: Tensor, cos_sin: Tensor, batch: Batch, pool: Tensor, layer: int, num_heads: int) -> None:
        """The table has what kind of rotation it is: plain, llama3, yarn and the others are one kernel."""
        assert isinstance(batch, PlannedBatch)
        kv_heads, head_dim = pool.shape[1], pool.shape[5]
        q, k, v = torch.split(qkv, [num_heads * head_dim, kv_heads * head_dim, kv_heads * head_dim], dim=1)
        if cos_sin.shape[1]:
            self._library.apply_rope_with_cos_sin_cache_inplace(batch.positions, q, k, head_dim, cos_sin)
        self._library.append_paged_kv_cache(
            _stored(k, pool.dtype).view(-1, kv_heads, head_dim),
            _stored(v, pool.dtype).view(-1, kv_heads, head_dim),
            batch.sequence,
            batch.positions,
            _layer(pool, layer),
            batch.page_indices,
            batch.page_indptr,
            batch.last_page_len,
            _LAYOUT,
        )

    def attention(self, qkv: Tensor, batch: Batch, pool: Tensor, layer: int, kind: AttentionKind) -> Tensor:
        assert isinstance(batch, PlannedBatch)
        num_heads, head_dim = kind.num_heads, pool.shape[5]
        if kind not in batch.wrappers:  # the first step of all, as the engine warms up
            self._kinds[kind] = None
            self._staging.wait()
            self._plan_kind(batch, kind, pool, qkv.dtype, None)
            self._staging.sent()
        q = qkv[:, : num_heads * head_dim].view(-1, num_heads, head_dim)
        attended: Tensor = batch.wrappers[kind].run(q, _layer(pool, layer))
        return attended.view(-1, num_heads * head_dim)

    def linear(self, x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
        assert isinstance(weight, Tensor), "a device has dense weights"
        return functional.linear(x, weight, bias)

    def silu_and_mul(self, x: Tensor) -> Tensor:
        activated: Tensor = self._library.silu_and_mul(x)
        return activated

    def gelu_and_mul(self, x: Tensor) -> Tensor:
        activated: Tensor = self._library.gelu_tanh_and_mul(x)
        return activated


def load(device: torch.device, head_dim: int, dtype: torch.dtype, prefill: str = "auto") -> FlashInferKernels:
    """
    Args:
        prefill: as of `FlashInferKernels`.

    Raises:
        FlashInferUnavailable: it is not installed, or has no kernels for the GPU, the heads or the dtype.
    """
    if device.type != "cuda":
        raise FlashInferUnavailable("it runs on CUDA")
    if head_dim not in HEAD_DIMS:
        raise FlashInferUnavailable(f"it has heads of {', '.join(map(str, HEAD_DIMS))}, not of {head_dim}")
    if dtype not in (torch.bfloat16, torch.float16):
        raise FlashInferUnavailable(f"it computes in 16 bits, not in {dtype}")
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < (8, 0):
        raise FlashInferUnavailable(f"it needs compute capability 8.0, the GPU has {major}.{minor}")
    if prefill == "fa3" and major != 9:
        raise FlashInferUnavailable(f"fa3 is for compute capability 9, the GPU has {major}.{minor}")
    os.environ.setdefault("FLASHINFER_USE_CUDA_NORM", "1")  # not the ones that nvidia-cutlass-dsl would bring
    try:
        library = importlib.import_module("flashinfer")
    except ImportError as error:
        raise FlashInferUnavailable(f"the package flashinfer-python is not installed ({error})") from error
    if (missing := _missing_to_build(Path(str(library.__file__)).parent)) is not None:
        raise FlashInferUnavailable(f"its kernels are compiled at the first call, and {missing} is missing")
    return FlashInferKernels(library, device, prefill)


def _missing_to_build(package: Path) -> str | None:
    """What the machine lacks to compile kernels, as FlashInfer looks for it; None where they come compiled."""
    if any(package.glob("data/aot/*/*.so")) or importlib.util.find_spec("flashinfer_jit_cache") is not None:
        return None
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    compilers = (Path(home) / "bin/nvcc",) if home else (Path("/usr/local/cuda/bin/nvcc"),)
    if not any(map(Path.exists, compilers)) and (home or shutil.which("nvcc") is None):
        return "nvcc (set CUDA_HOME)"
    return None if shutil.which("ninja") else "ninja"


def _layer(pool: Tensor, layer: int) -> tuple[Tensor, Tensor]:
    """K and V of one layer, `[blocks, kv_heads, block_size, head_dim]`, views with the pool's strides."""
    return pool[:, :, layer, 0], pool[:, :, layer, 1]


def _stored(x: Tensor, dtype: torch.dtype) -> Tensor:
    """As the pool keeps it; beyond its largest number float8_e4m3 knows only NaN."""
    if x.dtype == dtype:
        return x
    return (x.clamp(-448.0, 448.0) if dtype == _FP8 else x).to(dtype)


def _is_gemma(offset: float) -> bool:
    if offset not in (0.0, 1.0):
        raise ValueError(f"FlashInfer's norms add 0 or 1 to their weights, not {offset}")
    return offset == 1.0
