"""The kernel seam: the few operations that a model calls per layer, and the batch they work on.

Implementations: `reference` (plain torch, the truth), `native` (a C library built once per machine), `flashinfer` and
`sdpa` (GPUs). One test suite runs over all of them.

The KV pool is one tensor `[num_blocks, kv_heads, layers, 2, block_size, head_dim]` (kvstore.layout); index 2 is k, v.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor

from pdserve.kernels.quantised import QuantisedWeight


@dataclass(frozen=True, slots=True)
class Batch:
    """The tokens of one step, all sequences laid end to end; int32, contiguous, on the pool's device.

    Sequence s owns rows query_start[s] .. query_start[s+1]-1, which are the last tokens of its context: the row of
    offset i stands at position context_len[s] - query_len + i and may attend to positions up to its own.
    """

    positions: Tensor  # [tokens]
    query_start: Tensor  # [sequences + 1]
    context_len: Tensor  # [sequences], tokens in the cache once this step has appended
    block_tables: Tensor  # [sequences, max_blocks]; entries past the context are never read
    max_query_len: int


class AttentionKind(NamedTuple):
    """What tells the attention of one layer from that of another, beside their tensors."""

    num_heads: int  # of q
    scale: float  # of scores
    window: int = 0  # a token attends to so many, itself included; 0: to all before it
    softcap: float = 0.0  # scores become softcap * tanh(score / softcap); 0: they stay


Weight = Tensor | QuantisedWeight  # of a matrix product


class Kernels(Protocol):
    """What a model needs beside matrix products. `tokens` is T, `Hq`/`Hkv` are heads, `D` is head_dim."""

    name: str

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
        """x [..., H] -> a new tensor of the same shape: x / rms(x) * (offset + weight), computed in float32."""
        ...

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
        """residual += x in place, then the norm of residual, in a new tensor or in x; both [T, H]."""
        ...

    def norm_slices(self, x: Tensor, begin: int, count: int, weight: Tensor, eps: float, offset: float = 0.0) -> None:
        """In place: the norm of `count` slices of each row of x [T, W], of the weight's size, the first at `begin`."""
        ...

    def rope_append(self, qkv: Tensor, cos_sin: Tensor, batch: Batch, pool: Tensor, layer: int, num_heads: int) -> None:
        """Rotate q and k of qkv [T, (Hq + 2 Hkv) * D] in place (half-split, as Llama), then write k and v to the pool.

        cos_sin [max_position, R] float32: cos of R/2 frequencies, then sin; the first R <= D elements of a head are
        rotated, none where R is 0.
        """
        ...

    def attention(self, qkv: Tensor, batch: Batch, pool: Tensor, layer: int, kind: AttentionKind) -> Tensor:
        """Causal attention of the rotated q in qkv over the pool -> [T, Hq * D]."""
        ...

    def linear(self, x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
        """x [..., K] times the transpose of weight [N, K], plus bias [N] -> [..., N]; summed in float32.

        With a quantised weight, x is rounded as `pdserve.kernels.quantised.rounded` says.
        """
        ...

    def silu_and_mul(self, x: Tensor) -> Tensor:
        """x [T, 2 I], gate first -> silu(gate) * up, [T, I]."""
        ...

    def gelu_and_mul(self, x: Tensor) -> Tensor:
        """The same with gelu in its tanh approximation."""
        ...
