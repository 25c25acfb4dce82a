"""The manifest: the last message of a ticket, which says what the blocks before it must be.

    magic "PDMF" | version u16 | zero u16 | ticket_id u64 | content key 16 bytes | num_blocks u32 | num_tokens u32
    num_blocks x (generation u64, xxh3-64 u64) | num_tokens x token id u32 | xxh3-64 of everything before, u64

All little-endian. The receiver knows both counts from its ticket, so it knows the size before it posts the receive and
trusts no length that the peer wrote. The content key says whose KV the blocks are: checksums alone would pass a ticket
that was given to the wrong prompt.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import xxhash

from kvstore.errors import TransferError
from kvstore.keys import KEY_BYTES, BlockKey
from kvstore.transfer.tags import MAX_BLOCKS, MAX_TICKET_ID

_MAGIC = b"PDMF"
_VERSION = 2
_HEADER = struct.Struct(f"<4sHHQ{KEY_BYTES}sII")
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
class Subject:
    """What the manifest of a ticket must be about, as its receiver knows beforehand."""

    ticket_id: int
    content: BlockKey  # of the tokens whose KV moves (kvstore.keys.content_key)
    num_tokens: int  # output tokens so far
    vocab_size: int  # that they lie below


@dataclass(frozen=True, slots=True)
class Manifest:
    """`seals[n]` belongs to block n of the ticket; `output_token_ids` are all tokens generated so far, oldest first."""

    ticket_id: int
    content: BlockKey
    seals: tuple[BlockSeal, ...]
    output_token_ids: tuple[int, ...]

    def __post_init__(self) -> None:
        if not 0 <= self.ticket_id <= MAX_TICKET_ID:
            raise ValueError(f"ticket id must lie in [0, 2**48), got {self.ticket_id}")
        if len(self.seals) > MAX_BLOCKS:
            raise ValueError(f"a ticket has at most {MAX_BLOCKS} blocks, got {len(self.seals)}")
        if len(self.output_token_ids) > MAX_OUTPUT_TOKENS:
            raise ValueError(f"a manifest carries at most {MAX_OUTPUT_TOKENS} tokens, got {len(self.output_token_ids)}")

    @property
    def _counts(self) -> tuple[int, int]:
        return len(self.seals), len(self.output_token_ids)

    def encode(self) -> bytes:
        """The message; `manifest_bytes` long."""
        body = b"".join(
            (
                _HEADER.pack(_MAGIC, _VERSION, 0, self.ticket_id, self.content, *self._counts),
                *(_BLOCK.pack(seal.generation, seal.checksum) for seal in self.seals),
                struct.pack(f"<{len(self.output_token_ids)}I", *self.output_token_ids),
            )
        )
        return body + _TRAILER.pack(xxhash.xxh3_64_intdigest(body))

    @classmethod
    def decode(cls, data: bytes, subject: Subject, num_blocks: int) -> Manifest:
        """Read a peer's message against what the ticket says.

        Raises:
            TransferError: wrong size, damaged, another version, about another ticket or prompt, or no tokens of ours.
        """
        expected = manifest_bytes(num_blocks, subject.num_tokens)
        if len(data) != expected:
            raise TransferError(f"manifest has {len(data)} bytes, the ticket asks for {expected}")
        end = len(data) - _TRAILER.size
        if _TRAILER.unpack_from(data, end)[0] != xxhash.xxh3_64_intdigest(data[:end]):
            raise TransferError("manifest is damaged: its checksum does not match")
        magic, version, zero, ticket, content, *counts = _HEADER.unpack_from(data)
        if (magic, version, zero) != (_MAGIC, _VERSION, 0):
            raise TransferError(f"not a manifest of version {_VERSION}")
        if (ticket, counts) != (subject.ticket_id, [num_blocks, subject.num_tokens]):
            raise TransferError(
                f"manifest is about ticket {ticket} with {counts[0]} blocks and {counts[1]} tokens, "
                f"expected {subject.ticket_id} with {num_blocks} and {subject.num_tokens}"
            )
        if content != subject.content:
            raise TransferError("manifest is about the KV of other tokens")
        start = _HEADER.size
        tokens_start = start + num_blocks * _BLOCK.size
        seals = tuple(BlockSeal(*pair) for pair in _BLOCK.iter_unpack(data[start:tokens_start]))
        output_token_ids = struct.unpack_from(f"<{subject.num_tokens}I", data, tokens_start)
        if any(token_id >= subject.vocab_size for token_id in output_token_ids):
            raise TransferError(f"manifest has a token outside the vocabulary of {subject.vocab_size}")
        return cls(ticket, content, seals, output_token_ids)
