"""Limits of one engine."""

from __future__ import annotations

from dataclasses import dataclass

from pdserve.errors import ConfigError


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """`max_batched_tokens` bounds one step, so it bounds the gap that a prefill chunk puts between two decode steps."""

    num_blocks: int
    block_size: int = 16  # tokens
    max_batched_tokens: int = 512
    max_sequences: int = 64  # running, and arriving ones
    max_waiting: int = 1024  # sequences queued; one more is refused
    max_model_len: int = 8192  # tokens, prompt and output together
    speculate_tokens: int = 0  # of a draft that a decode step checks; 0 drafts nothing
    handoff_s: float = 30.0  # a computed prompt waits this long at most for its blocks to be pushed

    def __post_init__(self) -> None:
        for name in ("num_blocks", "block_size", "max_batched_tokens", "max_sequences", "max_waiting", "max_model_len"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} must be positive, got {getattr(self, name)}")
        if not 0 <= self.speculate_tokens <= 32:
            raise ConfigError(f"speculate_tokens must lie from 0 to 32, got {self.speculate_tokens}")
        if self.max_batched_tokens < self.max_sequences:
            raise ConfigError(
                f"max_batched_tokens ({self.max_batched_tokens}) must be at least max_sequences "
                f"({self.max_sequences}), or a step cannot decode every running sequence"
            )
        if self.num_blocks * self.block_size < self.max_model_len:
            raise ConfigError(
                f"the KV pool holds {self.num_blocks * self.block_size} tokens, fewer than one request may have "
                f"({self.max_model_len}): give it more KV memory or a smaller max_model_len"
            )
