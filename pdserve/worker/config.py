"""Settings of a worker process, and its place in the world."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Literal

from kvstore.control_plane import IN_THE_CLEAR, ControlPlane
from kvstore.layout import KvDtype
from pdserve.errors import ConfigError
from pdserve.models.weight_format import LoadFormat, WeightFormat
from pdserve.protocol import worker_pb2 as pb

TransportName = Literal["ucx", "nixl"]
_WORKER_ID = re.compile(r"[\w.-]{1,253}", re.ASCII)


class Role(Enum):
    """What a worker is preferred for. Any worker can run a whole request when the role for it is missing."""

    PREFILL = "prefill"
    DECODE = "decode"
    MIXED = "mixed"

    def to_proto(self) -> pb.Role:
        return {Role.PREFILL: pb.PREFILL, Role.DECODE: pb.DECODE, Role.MIXED: pb.MIXED}[self]


@dataclass(frozen=True, slots=True)
class LinkLimits:
    """Of one link to a peer worker."""

    dial_s: float = 5.0  # for the peer's answer, and for the probe
    backoff_s: tuple[float, ...] = (0.2, 0.5, 1.0, 2.0, 5.0, 10.0)  # before dialling again
    probe_bytes: int = 8 << 20
    check_s: float = 2.0  # between two questions whether the peer still has its end


@dataclass(frozen=True, slots=True)
class WorkerLimits:
    """Every wait and buffer of a worker in one place: seconds are durations on the monotonic clock."""

    handoff_s: float = 30.0  # prefill: from the last chunk's start until everything has been sent
    drain_s: float = 5.0  # what is under way ends within this, or the link is closed under it
    closed_tickets: int = 4096  # remembered, with what was sent under each
    reservations: int = 256  # that wait for room
    reservation_s: float = 2.0  # a reservation waits so long for room; the router waits longer for the answer
    arrival_s: float = 30.0  # decode: from the ticket until the blocks must be there
    fence_s: float = 3.0  # a peer that does not acknowledge in this time has its link closed
    tick_s: float = 1.0  # deadlines are looked at so often
    stalled_s: float = 10.0  # a step that takes so long is not progress
    exit_s: float = 60.0  # a step that takes so long will not end
    link: LinkLimits = field(default_factory=LinkLimits)


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
    device: str = "auto"  # or cpu, cuda, cuda:N
    dtype: KvDtype = "bfloat16"
    kv_dtype: KvDtype | None = None  # None: dtype
    kv_bytes: int | None = None  # None: 1 GiB, or on a GPU what the next leaves
    gpu_memory_utilization: float = 0.9  # this worker's share of the device's memory
    block_size: int = 16
    max_batched_tokens: int = 512
    speculate_tokens: int = 0
    max_sequences: int = 64
    max_model_len: int | None = None  # None: what the model allows, as far as the pool holds it
    threads: int = 1
    kernels: str = "auto"
    weights: WeightFormat = "dense"
    load_format: LoadFormat = "auto"  # dummy: random weights of the shape that config.json gives
    vllm_names: bool = True  # metrics under the names of vLLM too
    transport: TransportName = "ucx"
    store: Path | None = None  # socket of the store node of this machine
    control: ControlPlane = IN_THE_CLEAR  # how routers and peers reach us and we them
    limits: WorkerLimits = field(default_factory=WorkerLimits)

    def __post_init__(self) -> None:
        """Raises ConfigError."""
        if not _WORKER_ID.fullmatch(self.worker_id):  # it stands in paths and headers of the router
            raise ConfigError("--worker-id takes 1 to 253 letters, digits, dots, dashes and underscores.")
