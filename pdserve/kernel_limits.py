"""What the native kernels can run, where `pdserve models` reads it without loading torch."""

from __future__ import annotations

HEAD_DIM_STEP = 8
MAX_HEAD_DIM = 256
MAX_GROUP = 64  # query heads of one kv head


def native_refusal(head_dim: int, group: int) -> str | None:
    """Why the native kernels cannot run a model, or None if they can."""
    if head_dim % HEAD_DIM_STEP or head_dim > MAX_HEAD_DIM:
        return f"they need a head_dim that is a multiple of {HEAD_DIM_STEP} up to {MAX_HEAD_DIM}, not {head_dim}"
    if group > MAX_GROUP:
        return f"they need at most {MAX_GROUP} heads a kv head, not {group}"
    return None
