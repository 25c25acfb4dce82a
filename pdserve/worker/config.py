"""Settings of a worker process, and its place in the world."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from kvstore.layout import KvDtype
from pdserve.protocol import worker_pb2 as pb


class Role(Enum):
    """What a worker is preferred for. Any worker can run a whole request when the role for it is missing."""

    PREFILL = "prefill"
    DECODE = "decode"
    MIXED = "mixed"

    def to_proto(self) -> pb.Role:
        return {Role.PREFILL: pb.PREFILL, Role.DECODE: pb.DECODE, Role.MIXED: pb.MIXED}[self]


@dataclass(frozen=True, slots=True)
class WorkerConfig:
    """From the command line (pdserve.worker.__main__); sizes of the engine are in EngineConfig."""

    role: Role
    worker_id: str
    model: Path
    host: str = "127.0.0.1"
    port: int = 0  # 0 lets the system choose
    admin_port: int = 0
    redis_url: str | None = None
    namespace: str = "default"
    dtype: KvDtype = "bfloat16"
    kv_bytes: int = 1 << 30
    block_size: int = 16
    max_batched_tokens: int = 512
    max_sequences: int = 64
    max_model_len: int | None = None  # None: what the model allows, as far as the pool holds it
    threads: int = 1
    kernels: str = "auto"


def host_id() -> str:
    """Equal for processes that share memory and see each other's process ids: one boot, one pid and ipc namespace.

    Two containers of one machine differ here unless they share both, and then talk as two machines would.
    """
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    namespaces = [os.stat(f"/proc/self/ns/{kind}").st_ino for kind in ("pid", "ipc")]
    return ":".join([socket.gethostname(), boot, *map(str, namespaces)])
