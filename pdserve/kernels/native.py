"""The kernels in C++ (pdserve/csrc), called through ctypes, which releases the interpreter lock.

A call costs a few microseconds and there are some three hundred in a step, so what can be checked once is: a pool when
it is first seen, a batch once a step.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor
from torch.nn import functional

from pdserve.kernel_limits import MAX_GROUP, native_refusal
from pdserve.kernels.base import AttentionKind, Batch, Weight
from pdserve.kernels.build import NativeUnavailable
from pdserve.kernels.library import FLOAT, INT, POINTER, Function, bind, open_library
from pdserve.kernels.quantised import QuantisedWeight
from pdserve.kernels.self_check import check

_AVX512_BF16, _AMX = 1, 2  # bits of pds_init's result
_SUFFIXES = {torch.bfloat16: "bf16", torch.float32: "f32"}
_P, _I, _F = POINTER, INT, FLOAT


class _Batch(ctypes.Structure):
    """`Batch` of common.h."""

    _fields_ = (
        ("positions", _P),
        ("query_start", _P),
        ("context_len", _P),
        ("block_tables", _P),
        ("tokens", ctypes.c_int32),
        ("sequences", ctypes.c_int32),
        ("max_blocks", ctypes.c_int32),
    )


class _Pool(ctypes.Structure):
    """`Pool` of common.h."""

    _fields_ = (
        ("data", _P),
        ("block_stride", ctypes.c_int64),
        ("head_stride", ctypes.c_int64),
        ("num_blocks", ctypes.c_int32),
        ("kv_heads", ctypes.c_int32),
        ("layers", ctypes.c_int32),
        ("block_size", ctypes.c_int32),
        ("head_dim", ctypes.c_int32),
    )


_SIGNATURES = {
    "rms_norm": (None, (_P, _P, _P, _I, _I, _F, _F, _I)),
    "add_rms_norm": (None, (_P, _P, _P, _P, _I, _I, _F, _F, _I)),
    "norm_slices": (None, (_P, _P, _I, _I, _I, _I, _I, _F, _F, _I)),
    "silu_and_mul": (None, (_P, _P, _I, _I, _I)),
    "gelu_and_mul": (None, (_P, _P, _I, _I, _I)),
    "rope_append": (_I, (_P, _P, _I, _I, _P, _P, _I, _I, _I)),
    "attention": (None, (_P, _P, _P, _P, _I, _I, _F, _I, _F, _I)),
    "linear_int8": (None, (_P, _P, _P, _P, _P, _I, _I, _I, _I)),
    "linear_int4": (None, (_P, _P, _P, _P, _P, _I, _I, _I, _I)),
}


def load() -> NativeKernels:
    """Build the library if need be, load it, and compare every operation with the reference on a few tokens.

    Uses as many threads as torch does at this moment.

    Raises:
        NativeUnavailable: it cannot be built or loaded here, or computes something else than the reference.
    """
    kernels = NativeKernels(open_library(), torch.get_num_threads())
    wrong = check(kernels)
    if wrong is not None:
        raise NativeUnavailable(f"the compiled kernels failed their self-check: {wrong}")
    return kernels


class NativeKernels:
    """`pdserve.kernels.base.Kernels` for bfloat16 and float32 on the CPU; head_dim a multiple of 8 up to 256.

    Its methods raise ValueError for tensors that the library cannot read. For one thread at a time: it remembers the
    batch and the pool that it saw last.

    Prefill is the library's too, whatever the shape: beside gathering K and V and torch's scaled_dot_product_attention
    it was measured 2.0 to 3.5 times as fast with AMX, 3.0 to 4.3 times with AVX-512 BF16, 1.3 to 2.2 times in float32.
    """

    name = "native"

    def __init__(self, library: ctypes.CDLL, threads: int) -> None:
        self._threads = threads
        self._features = int(library.pds_init())
        functions = {op: _by_dtype(library, op) for op in _SIGNATURES}
        self._rms_norm = functions["rms_norm"]
        self._add_rms_norm = functions["add_rms_norm"]
        self._norm_slices = functions["norm_slices"]
        self._silu_and_mul = functions["silu_and_mul"]
        self._gelu_and_mul = functions["gelu_and_mul"]
        self._rope_append = functions["rope_append"]
        self._attention = functions["attention"]
        self._quantised = {8: functions["linear_int8"], 4: functions["linear_int4"]}
        self._linear = bind(library, "linear_bf16", None, (_P, _P, _P, _P, _I, _I, _I, _I))
        self._batch_fits = bind(library, "batch_fits", _I, (_P, _P))
        self.most_rows = most_rows(self._features)
        self._batch: Batch | None = None
        self._pool: Tensor | None = None

    @property
    def features(self) -> str:
        """The instruction sets in use beyond the compiler's own, for the log."""
        names = ((_AVX512_BF16, "AVX-512 BF16"), (_AMX, "AMX"))
        return ", ".join(name for bit, name in names if self._features & bit) or "compiler vectors"

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
        x = x.contiguous()
        hidden = _norm_size(x, weight)
        out = torch.empty_like(x)
        pointers = (out.data_ptr(), x.data_ptr(), weight.data_ptr())
        _of(self._rms_norm, x)(*pointers, x.numel() // hidden, hidden, eps, offset, self._threads)
        return out

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
        x = x.contiguous()
        hidden = _norm_size(x, weight)
        if residual.shape != x.shape or residual.dtype != x.dtype or not residual.is_contiguous():
            raise ValueError("residual must be contiguous and of x's shape and dtype")
        out = torch.empty_like(x)
        pointers = (out.data_ptr(), x.data_ptr(), residual.data_ptr(), weight.data_ptr())
        _of(self._add_rms_norm, x)(*pointers, x.numel() // hidden, hidden, eps, offset, self._threads)
        return out

    def norm_slices(self, x: Tensor, begin: int, count: int, weight: Tensor, eps: float, offset: float = 0.0) -> None:
        rows, width = x.shape
        size = weight.shape[0]
        if not x.is_contiguous() or begin < 0 or begin + count * size > width:
            raise ValueError(f"{count} slices of {size} from {begin} on do not fit rows of {width}, contiguous")
        if weight.dtype != x.dtype or not weight.is_contiguous():
            raise ValueError(f"weight {weight.dtype} does not fit x {x.dtype}")
        shape = (rows, width, begin, count, size)
        _of(self._norm_slices, x)(x.data_ptr(), weight.data_ptr(), *shape, eps, offset, self._threads)

    def silu_and_mul(self, x: Tensor) -> Tensor:
        return self._activate(self._silu_and_mul, x)

    def gelu_and_mul(self, x: Tensor) -> Tensor:
        return self._activate(self._gelu_and_mul, x)

    def rope_append(self, qkv: Tensor, cos_sin: Tensor, batch: Batch, pool: Tensor, layer: int, num_heads: int) -> None:
        self._take(qkv, batch, pool, layer, num_heads)
        max_position, rotary = cos_sin.shape
        if cos_sin.dtype != torch.float32 or not cos_sin.is_contiguous() or rotary % 2 or rotary > pool.shape[5]:
            raise ValueError("cos_sin must be float32, contiguous, [max_position, an even part of head_dim]")
        function = _of(self._rope_append, qkv)
        pointers = (qkv.data_ptr(), cos_sin.data_ptr(), max_position, rotary, self._batch_pointer, self._pool_pointer)
        if not function(*pointers, layer, num_heads, self._threads):
            raise ValueError(f"a position of the batch lies outside the {max_position} of cos_sin")

    def attention(self, qkv: Tensor, batch: Batch, pool: Tensor, layer: int, kind: AttentionKind) -> Tensor:
        self._take(qkv, batch, pool, layer, kind.num_heads)
        out = qkv.new_empty(qkv.shape[0], kind.num_heads * pool.shape[5])
        pointers = (out.data_ptr(), qkv.data_ptr(), self._batch_pointer, self._pool_pointer)
        _of(self._attention, qkv)(*pointers, layer, *kind, self._threads)
        return out

    def linear(self, x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
        if isinstance(weight, QuantisedWeight):
            return self._linear_quantised(x, weight, bias)
        size, depth = weight.shape
        rows = x.numel() // depth
        if not (0 < rows <= self.most_rows and _streams(x, weight, bias)):
            return functional.linear(x, weight, bias)
        out = x.new_empty(*x.shape[:-1], size)
        bias_pointer = None if bias is None else bias.data_ptr()
        pointers = (out.data_ptr(), x.data_ptr(), weight.data_ptr(), bias_pointer)
        self._linear(*pointers, rows, size, depth, self._threads)
        return out

    def _linear_quantised(self, x: Tensor, weight: QuantisedWeight, bias: Tensor | None) -> Tensor:
        size, depth = weight.shape
        x = x.contiguous()
        if x.shape[-1] != depth or (bias is not None and (bias.shape != (size,) or bias.dtype != x.dtype)):
            raise ValueError(f"x {tuple(x.shape)} {x.dtype} does not fit a weight {weight.shape} and its bias")
        out = x.new_empty(*x.shape[:-1], size)
        bias_pointer = None if bias is None else bias.data_ptr()
        pointers = (out.data_ptr(), x.data_ptr(), weight.data.data_ptr(), weight.scales.data_ptr(), bias_pointer)
        _of(self._quantised[weight.bits], x)(*pointers, x.numel() // depth, size, depth, self._threads)
        return out

    def _activate(self, functions: dict[torch.dtype, Function], x: Tensor) -> Tensor:
        x = x.contiguous()
        rows, double = x.shape
        if double % 2:
            raise ValueError("an activation takes gate and up of the same size")
        out = x.new_empty(rows, double // 2)
        _of(functions, x)(out.data_ptr(), x.data_ptr(), rows, double // 2, self._threads)
        return out

    def _take(self, qkv: Tensor, batch: Batch, pool: Tensor, layer: int, num_heads: int) -> None:
        """Bind pool and batch, and check what may change from layer to layer."""
        if pool is not self._pool:
            self._take_pool(pool)
        if batch is not self._batch:
            self._take_batch(batch)
        _, kv_heads, layers, _, _, head_dim = pool.shape
        if qkv.shape != (self._tokens, (num_heads + 2 * kv_heads) * head_dim) or not qkv.is_contiguous():
            raise ValueError(f"qkv of shape {tuple(qkv.shape)} does not fit the batch, the pool and {num_heads} heads")
        if num_heads % kv_heads or num_heads > MAX_GROUP * kv_heads or not 0 <= layer < layers:
            raise ValueError(f"{num_heads} heads over {kv_heads} kv heads, layer {layer} of {layers}")
        if qkv.dtype != pool.dtype:
            raise ValueError(f"qkv is {qkv.dtype} and the pool is {pool.dtype}")

    def _take_pool(self, pool: Tensor) -> None:
        if pool.dim() != 6 or pool.shape[3] != 2 or not pool.is_contiguous() or pool.device.type != "cpu":
            raise ValueError("the pool must be contiguous, on the CPU, with six dimensions of which the fourth is 2")
        num_blocks, kv_heads, layers, _, block_size, head_dim = pool.shape
        refusal = native_refusal(head_dim, group=1)
        if refusal is not None:
            raise ValueError(refusal)
        strides = pool.stride()
        sizes = (num_blocks, kv_heads, layers, block_size, head_dim)
        self._pool_struct = _Pool(pool.data_ptr(), strides[0], strides[1], *sizes)
        self._pool_pointer = ctypes.addressof(self._pool_struct)
        self._pool, self._batch = pool, None  # a batch is checked against its pool

    def _take_batch(self, batch: Batch) -> None:
        tensors = (batch.positions, batch.query_start, batch.context_len, batch.block_tables)
        if any(t.dtype != torch.int32 or not t.is_contiguous() for t in tensors):
            raise ValueError("the tensors of a batch must be int32 and contiguous")
        tokens, sequences, max_blocks = len(batch.positions), len(batch.context_len), batch.block_tables.shape[1]
        if len(batch.query_start) != sequences + 1 or batch.block_tables.shape[0] != sequences:
            raise ValueError("the tensors of a batch disagree on the number of sequences")
        self._batch = None  # until the new one has passed
        pointers = (t.data_ptr() for t in tensors)
        self._batch_struct = _Batch(*pointers, tokens, sequences, max_blocks)
        self._batch_pointer = ctypes.addressof(self._batch_struct)
        if not self._batch_fits(self._batch_pointer, self._pool_pointer):
            raise ValueError("the batch reaches outside the pool, its tokens or its block tables")
        self._tokens = tokens
        self._batch = batch


def most_rows(features: int) -> int:
    """Rows up to which the library's matrix product beats torch's, measured over the shapes of a 135M model.

    With AMX 1.8 times at 1 to 64 rows, 1.6 at 128, 1.4 at 256, 1.25 at 512, 1.1 at 768, but 0.95 at 1,024; with dot
    products of bfloat16 pairs 1.7 times at 8 rows, 1.3 at 16, 1.1 at 32, 1.0 at 64.
    """
    if features & _AMX:
        return 768
    return 32 if features & _AVX512_BF16 else 0


def _streams(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether the library's matrix product knows such tensors."""
    size, depth = weight.shape
    return (
        x.dtype == weight.dtype == torch.bfloat16
        and size % 32 == depth % 32 == 0
        and x.shape[-1] == depth
        and x.is_contiguous()
        and weight.is_contiguous()
        and (bias is None or (bias.dtype == torch.bfloat16 and bias.shape == (size,)))
    )


def _norm_size(x: Tensor, weight: Tensor) -> int:
    hidden = weight.shape[0]
    if x.shape[-1] != hidden or weight.dtype != x.dtype or not weight.is_contiguous():
        raise ValueError(f"weight {tuple(weight.shape)} {weight.dtype} does not fit x {tuple(x.shape)} {x.dtype}")
    return hidden


def _of(functions: dict[torch.dtype, Function], x: Tensor) -> Function:
    try:
        return functions[x.dtype]
    except KeyError:
        raise ValueError(f"the native kernels know bfloat16 and float32, not {x.dtype}") from None


def _by_dtype(library: ctypes.CDLL, op: str) -> dict[torch.dtype, Function]:
    result, arguments = _SIGNATURES[op]
    return {dtype: bind(library, f"{op}_{suffix}", result, arguments) for dtype, suffix in _SUFFIXES.items()}
