"""What a store node is started with."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from kvstore.control_plane import IN_THE_CLEAR, ControlPlane


class SavePolicy(Enum):
    """Which blocks of the host tier go to disk too."""

    ALL = "all"
    SECOND_TOUCH = "second-touch"  # those that are used again after they were saved
    NONE = "none"


@dataclass(frozen=True, slots=True)
class StoreLimits:
    """Times in seconds."""

    lease_s: float = 30.0  # a reader copies and releases; longer than any load's deadline
    max_load_s: float = 30.0
    sweep_s: float = 0.5  # between two looks at what has expired
    write_behind_bytes: int = 256 << 20  # waiting for the disk; more is not written
    disk_batch_bytes: int = 8 << 20  # of one write or read call
    location_ttl_s: int = 600
    index_timeout_s: float = 0.05
    peer_dial_s: float = 1.0
    peer_fence_s: float = 1.0
    max_offers: int = 256  # prefixes kept for other nodes at one time
    close_s: float = 1.5  # for the disk to take what only the host tier has


@dataclass(frozen=True, slots=True)
class StoreConfig:
    """A tier with 0 bytes is off. `tenant_bytes` caps one named tenant in each tier; 0 is no cap."""

    node_id: str
    socket_path: Path
    host_bytes: int
    disk_bytes: int = 0
    disk_path: Path | None = None
    host: str = "127.0.0.1"
    port: int = 0
    admin_port: int = 0
    redis_url: str | None = None
    namespace: str = "default"
    policy: SavePolicy = SavePolicy.SECOND_TOUCH
    tenant_bytes: int = 0
    control: ControlPlane = IN_THE_CLEAR  # how other nodes reach us and we them
    limits: StoreLimits = field(default_factory=StoreLimits)


def operator_socket(socket_path: Path) -> Path:
    """Where a node whose workers use `socket_path` answers operators, by gRPC."""
    return socket_path.with_name(socket_path.name + ".ops")
