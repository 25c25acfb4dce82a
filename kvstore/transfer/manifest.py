"""The manifest: the last message of a ticket, which says what the blocks before it must be.

    magic "PDMF" | version u16 | zero u16 | ticket_id u64 | num_blocks u32 | num_tokens u32
    num_blocks x (generation u64, xxh3-64 u64) | num_tokens x token id u32 | xxh3-64 of everything before, u64

All little-endian. The receiver knows both counts from its ticket, so it knows the size before it posts the receive and
trusts no length that the peer wrote.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import xxhash

from kvstore.errors import TransferError
from kvstore.transfer.tags import MAX_BLOCKS, MAX_TICKET_ID

_MAGIC = b"PDMF"
_VERSION = 1
_HEADER = struct.Struct("<4sHHQII")
_BLOCK = struct.Struct("<QQ")
_TRAILER = struct.Struct("<Q")
_TOKEN_BYTES = 4
MAX_OUTPUT_TOKENS = 1 << 20


def manifest_bytes(num_blocks: int, num_tokens: int) -> int:
    """Size of the message for so many pushed blocks and output tokens."""
    return _HEADER.size + num_blocks * _BLOCK.size + num_tokens * _TOKEN_BYTES + _TRAILER.size


@dataclass(frozen=True, slots=True)
class BlockSeal:
    """What block n of a ticket must be: the receiver's generation for it and the checksum of the sender's bytes."""

    generation: int
    checksum: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """`seals[n]` belongs to block n of the ticket; `output_token_ids` are all tokens generated so far, oldest first."""

    ticket_id: int
    seals: tuple[BlockSeal, ...]
    output_token_ids: tuple[int, ...]

    def __post_init__(self) -> None:
        if not 0 <= self.ticket_id <= MAX_TICKET_ID:
            raise ValueError(f"ticket id must lie in [0, 2**48), got {self.ticket_id}")
        if len(self.seals) > MAX_BLOCKS:
            raise ValueError(f"a ticket has at most {MAX_BLOCKS} blocks, got {len(self.seals)}")
        if len(self.output_token_ids) > MAX_OUTPUT_TOKENS:
            raise ValueError(f"a manifest carries at most {MAX_OUTPUT_TOKENS} tokens, got {len(self.output_token_ids)}")

    def encode(self) -> bytes:
        """The message; `manifest_bytes` long."""
        body = b"".join(
            (
                _HEADER.pack(_MAGIC, _VERSION, 0, self.ticket_id, len(self.seals), len(self.output_token_ids)),
                *(_BLOCK.pack(seal.generation, seal.checksum) for seal in self.seals),
                struct.pack(f"<{len(self.output_token_ids)}I", *self.output_token_ids),
            )
        )
        return body + _TRAILER.pack(xxhash.xxh3_64_intdigest(body))

    @classmethod
    def decode(cls, data: bytes, *, ticket_id: int, num_blocks: int, num_tokens: int) -> Manifest:
        """Read a peer's message against what the ticket says.

        Raises:
            TransferError: wrong size, damaged, another version, or about another ticket.
        """
        expected = manifest_bytes(num_blocks, num_tokens)
        if len(data) != expected:
            raise TransferError(f"manifest has {len(data)} bytes, the ticket asks for {expected}")
        end = len(data) - _TRAILER.size
        if _TRAILER.unpack_from(data, end)[0] != xxhash.xxh3_64_intdigest(data[:end]):
            raise TransferError("manifest is damaged: its checksum does not match")
        magic, version, zero, ticket, blocks, tokens = _HEADER.unpack_from(data)
        if (magic, version, zero) != (_MAGIC, _VERSION, 0):
            raise TransferError(f"not a manifest of version {_VERSION}")
        if (ticket, blocks, tokens) != (ticket_id, num_blocks, num_tokens):
            raise TransferError(
                f"manifest is about ticket {ticket} with {blocks} blocks and {tokens} tokens, "
                f"expected {ticket_id} with {num_blocks} and {num_tokens}"
            )
        start = _HEADER.size
        tokens_start = start + num_blocks * _BLOCK.size
        seals = tuple(BlockSeal(*pair) for pair in _BLOCK.iter_unpack(data[start:tokens_start]))
        return cls(ticket, seals, struct.unpack_from(f"<{num_tokens}I", data, tokens_start))
