"""FlashInfer's calls that we make, in plain torch on the CPU: our side of them can be tested without a GPU.

Every call is recorded, so that a test can bind it to the real library's signatures.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pdserve.kernels.reference import ReferenceKernels, _attend

_TRUTH = ReferenceKernels()


@dataclass(frozen=True)
class Call:
    owner: str  # a class of the library; empty for a function
    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class FakeFlashInfer:
    def __init__(self) -> None:
        self.calls: list[Call] = []

    def record(self, owner: str, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.calls.append(Call(owner, name, args, kwargs))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("Batch"):

            def make(*args: Any, **kwargs: Any) -> _Wrapper:
                self.record(name, "__init__", args, kwargs)
                return _Wrapper(self, name, kwargs)

            return make
        function = globals()[f"_{name}"]

        def call(*args: Any, **kwargs: Any) -> Any:
            self.record("", name, args, kwargs)
            return function(*args, **kwargs)

        return call


class _Wrapper:
    """Plans are kept as the library keeps them: in the buffers given, where it is one for graphs."""

    def __init__(self, library: FakeFlashInfer, owner: str, kwargs: dict[str, Any]) -> None:
        self._library, self._owner, self._given = library, owner, kwargs
        self._decode = "Decode" in owner

    def plan(self, *args: Any, **kwargs: Any) -> None:
        self._library.record(self._owner, "plan", args, kwargs)
        starts, (indptr, indices, last, heads, kv_heads, dim, page) = None, args[-7:]
        if self._decode:
            starts = torch.arange(len(last) + 1)
        else:
            starts = args[0]
            assert kwargs["causal"]
        for host in (indptr, last, starts):
            assert host.device.type == "cpu"
        if self._given.get("use_cuda_graph"):
            assert len(last) == len(self._given["paged_kv_last_page_len_buffer"]), "a graph's batch size is fixed"
            assert len(indices) <= len(self._given["paged_kv_indices_buffer"])
        self._plan = (starts, indptr, indices, last, heads, kv_heads, dim, page, kwargs)

    def run(self, q: Tensor, kv: tuple[Tensor, Tensor], **kwargs: Any) -> Tensor:
        self._library.record(self._owner, "run", (q, kv), kwargs)
        starts, indptr, indices, last, heads, kv_heads, dim, page, options = self._plan
        k, v = kv
        assert k.stride() == v.stride()
        assert k.shape[1:] == (kv_heads, page, dim)
        assert q.shape[1:] == (heads, dim)
        assert (q.dtype, k.dtype) == (options["q_data_type"], options["kv_data_type"])
        out = torch.empty_like(q)
        for s in range(len(last)):
            blocks = indices[indptr[s] : indptr[s + 1]].long()
            context = (len(blocks) - 1) * page + int(last[s])
            ks, vs = (x[blocks].transpose(0, 1).reshape(kv_heads, -1, dim)[:, :context].float() for x in (k, v))
            rows = slice(int(starts[s]), int(starts[s + 1]))
            window = options["window_left"] + 1 or context
            out[rows] = _attend(q[rows], ks, vs, options["sm_scale"], window, options["logits_soft_cap"] or 0.0)
        return out


def _append_paged_kv_cache(
    k: Tensor,
    v: Tensor,
    batch_indices: Tensor,
    positions: Tensor,
    kv: tuple[Tensor, Tensor],
    indices: Tensor,
    indptr: Tensor,
    last: Tensor,
    kv_layout: str,
) -> None:
    assert kv_layout == "HND"
    page = kv[0].shape[2]
    block = indices[indptr[batch_indices.long()] + positions // page].long()
    for cache, new in zip(kv, (k, v), strict=True):
        assert cache.dtype == new.dtype
        cache[block, :, (positions % page).long()] = new


def _apply_rope_with_cos_sin_cache_inplace(positions: Tensor, q: Tensor, k: Tensor, size: int, table: Tensor) -> None:
    cos, sin = table[positions.long()].unsqueeze(1).chunk(2, dim=-1)
    for x in (q, k):
        heads = x.view(x.shape[0], -1, size)[..., : table.shape[1]]
        first, second = heads.float().chunk(2, dim=-1)
        heads.copy_(torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1))


def _rmsnorm(x: Tensor, weight: Tensor, eps: float, out: Tensor | None = None) -> Tensor:
    normed = _TRUTH.rms_norm(x, weight, eps)
    return normed if out is None else out.copy_(normed)


def _gemma_rmsnorm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    assert x.ndim == 2
    return _TRUTH.rms_norm(x, weight, eps, 1.0)


def _fused_add_rmsnorm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> None:
    x.copy_(_TRUTH.add_rms_norm(x.clone(), residual, weight, eps))


def _gemma_fused_add_rmsnorm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> None:
    x.copy_(_TRUTH.add_rms_norm(x.clone(), residual, weight, eps, 1.0))


def _silu_and_mul(x: Tensor) -> Tensor:
    return _TRUTH.silu_and_mul(x)


def _gelu_tanh_and_mul(x: Tensor) -> Tensor:
    return _TRUTH.gelu_and_mul(x)
