"""Every bound of the router's brain in one place: seconds are durations on the monotonic clock."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class LinkLimits:
    """One session to one worker."""

    ping_s: float = 1.0
    suspect_s: float = 3.0  # silent this long: no new work
    dead_s: float = 5.0  # silent this long: its requests move on
    hello_s: float = 5.0
    backoff_min_s: float = 0.1
    backoff_max_s: float = 2.0
    outbox_messages: int = 4096  # a worker that leaves more unread is dropped


@dataclass(frozen=True, slots=True)
class FleetLimits:
    poll_s: float = 1.0
    forget_s: float = 30.0  # dial an address this long after it was listed last
    warmup_s: float = 10.0  # wait this long for the other role, and for the first link, before being ready without
    expect_s: float = 60.0  # the same for roles that the deployment is said to have
    workers: int = 1024
    distrust_s: float = 30.0  # a pair whose hand-over failed gets no other so long
    link: LinkLimits = field(default_factory=LinkLimits)


@dataclass(frozen=True, slots=True)
class RouterLimits:
    """One request. The total deadline travels in the request itself."""

    active_requests: int = 1024
    queue_wait_s: float = 5.0  # for a worker that can take it at all
    queue_places: int = 1024
    # Also how long one waits for its turn. A worker that hangs is noticed by its pings long before.
    first_token_s: float = 120.0
    inter_token_s: float = 10.0
    reserve_s: float = 3.0  # for the answer to a reservation
    handoff_wait_s: float = 5.0  # for a decode worker with room; then prefill goes on by itself
    spill_after_s: float = 0.5  # instead, where there is a store: then the request waits there, not on a device
    spill_wait_s: float = 20.0  # for a decode worker with room, while the blocks are in the store
    handoff_base_s: float = 10.0  # ticket delivered until decode's first token, plus the time of the bytes
    handoff_bytes_per_s: float = 50e6
    handoff_cap_s: float = 30.0
    redispatches: int = 1  # before the first token
    migrations: int = 2  # after it
    hot_copy_bytes: int = 1 << 30  # of hot prefixes that are copied to further workers, in so many seconds
    hot_copy_window_s: float = 10.0
    held_tokens: int = 64  # tokens that overtook an earlier one
    fleet: FleetLimits = field(default_factory=FleetLimits)

    def handoff_s(self, blocks: int, block_bytes: int) -> float:
        """How long a hand-over of so many blocks may take."""
        return min(self.handoff_cap_s, self.handoff_base_s + blocks * block_bytes / self.handoff_bytes_per_s)
