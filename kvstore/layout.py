"""Block geometry: what the bytes of one block mean.

A block is the KV of `block_size` tokens for all layers, one contiguous range of bytes ordered
`[kv_head, layer, k|v, token, head_dim]`. So a block is one descriptor on the wire, the same bytes in every tier, and
the shard of a tensor-parallel rank is one contiguous slice of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b
from typing import Literal

KvDtype = Literal["bfloat16", "float32", "fp8_e4m3"]
ITEM_BYTES: dict[KvDtype, int] = {"bfloat16": 2, "float32": 4, "fp8_e4m3": 1}
LAYOUT = "kv_head,layer,k|v,token,head_dim"


@dataclass(frozen=True, slots=True)
class BlockGeometry:
    """Shape and element type of a block; equal on both ends of a transfer or the pair is refused."""

    block_size: int
    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: KvDtype

    def __post_init__(self) -> None:
        for name in ("block_size", "num_layers", "num_kv_heads", "head_dim"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.dtype not in ITEM_BYTES:
            raise ValueError(f"KV dtype must be one of {', '.join(ITEM_BYTES)}, got {self.dtype!r}")

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """`[kv_head, layer, k|v, token, head_dim]`."""
        return (self.num_kv_heads, self.num_layers, 2, self.block_size, self.head_dim)

    @property
    def block_bytes(self) -> int:
        return 2 * self.block_size * self.num_layers * self.num_kv_heads * self.head_dim * ITEM_BYTES[self.dtype]

    def fingerprint(self, model_identity: str) -> bytes:
        """16 bytes that differ whenever two workers could not read each other's blocks.

        Args:
            model_identity: names the weights (a hash of them), not their path.
        """
        parts = (
            LAYOUT,
            model_identity,
            self.dtype,
            *map(str, (self.block_size, self.num_layers, self.num_kv_heads, self.head_dim)),
        )
        return blake2b("\0".join(parts).encode(), digest_size=16).digest()
