"""A stub model for which a wrong KV block is a wrong text.

What it writes to a token's slot, in every layer and head, is derived from the token and from everything that it reads
back before it through the block table; the next token is derived from all that it has read. So a block that is
misplaced, stale, missing, half written or foreign changes the text. `undisturbed` says what the text must be, without
any engine.

    state_0 = ""   slot_p = expand(state_p, token_p, p)    state_{p+1} = H(state_p, slot_p)   logits_p = f(state_{p+1})
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from hashlib import blake2b, shake_128

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvstore.layout import BlockGeometry
from pdserve.engine.sampler import SamplingRow
from pdserve.engine.sequence import Grammar
from pdserve.engine.token_counts import TokenCounts
from pdserve.engine.torch_sampler import TorchSampler
from pdserve.kernels.base import Batch
from pdserve.request import SamplingParams

VOCAB_SIZE = 61
_STATE_BYTES = 16
_POSITION = struct.Struct("<qq")


class OracleModel:
    """Implements `pdserve.engine.runner.Model` for a pool of any geometry. A hidden state is the state's 16 bytes."""

    def __init__(self, vocab_size: int = VOCAB_SIZE) -> None:
        self._vocab_size = vocab_size

    def forward(self, token_ids: Tensor, batch: Batch, pool: Tensor) -> Tensor:
        data = pool.view(torch.uint8).numpy()  # [blocks, kv_heads, layers, 2, block_size, bytes]
        states = np.empty((len(token_ids), _STATE_BYTES), np.uint8)
        for number, context in enumerate(batch.context_len.tolist()):
            first, end = batch.query_start[number : number + 2].tolist()
            start = context - (end - first)
            assert batch.positions[first:end].tolist() == list(range(start, context)), "rows do not stand at the end"
            table = batch.block_tables[number].tolist()
            state = b""
            for position in range(context):
                block, offset = divmod(position, pool.shape[4])
                slot = data[table[block], :, :, :, offset]
                if position >= start:
                    token = int(token_ids[first + position - start])
                    slot[...] = _slot(state, token, position, slot.size).reshape(slot.shape)
                state = _after(state, slot.tobytes())
                if position >= start:
                    states[first + position - start] = np.frombuffer(state, np.uint8)
        return torch.from_numpy(states.astype(np.float32))

    def logits(self, hidden: Tensor) -> Tensor:
        return torch.stack([_logits(row.numpy().astype(np.uint8).tobytes(), self._vocab_size) for row in hidden])


def undisturbed(
    prompt: Sequence[int],
    sampling: SamplingParams,
    geometry: BlockGeometry,
    *,
    max_model_len: int = 2**31,
    vocab_size: int = VOCAB_SIZE,
    grammar: Grammar | None = None,
) -> list[int]:
    """The output tokens of a request that nothing happens to, its stop token included.

    Args:
        grammar: what the output must be; has not followed anything yet.
    """
    slot_bytes = geometry.block_bytes // geometry.block_size
    state, tokens, output = b"", list(prompt), []
    for position in range(max_model_len):
        state = _after(state, _slot(state, tokens[position], position, slot_bytes).tobytes())
        if position < len(tokens) - 1:
            continue
        counts = TokenCounts(prompt) if sampling.penalises else None
        if counts is not None:
            counts.follow(output)
        row = SamplingRow(sampling, len(output), counts, grammar)
        [token] = TorchSampler().choose(_logits(state, vocab_size)[None], [row])
        tokens.append(token)
        output.append(token)
        stopped = token in sampling.stop_token_ids and len(output) >= sampling.min_tokens
        if grammar is not None:
            grammar.follow(output)
            stopped = stopped or grammar.failed or grammar.ended
        if stopped or len(output) >= sampling.max_tokens or len(tokens) >= max_model_len:
            break
    return output


def empty_pool(geometry: BlockGeometry, num_blocks: int) -> Tensor:
    """Pool memory full of bytes that no slot has by chance."""
    memory = torch.full((num_blocks, geometry.block_bytes), 0xA5, dtype=torch.uint8)
    return memory.view(getattr(torch, geometry.dtype)).view(num_blocks, *geometry.shape)


def _slot(state: bytes, token: int, position: int, num_bytes: int) -> NDArray[np.uint8]:
    return np.frombuffer(shake_128(state + _POSITION.pack(token, position)).digest(num_bytes), np.uint8)


def _after(state: bytes, slot: bytes) -> bytes:
    return blake2b(state + slot, digest_size=_STATE_BYTES).digest()


def _logits(state: bytes, vocab_size: int) -> Tensor:
    """float32 [vocab] in [0, 8), each value a 64-bit mix (splitmix64) of the state and the token id."""
    seed = np.frombuffer(state, np.uint64)[0]
    mixed = np.arange(1, vocab_size + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + seed
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return torch.from_numpy((mixed >> np.uint64(40)).astype(np.float32) * np.float32(8 / 2**24))
