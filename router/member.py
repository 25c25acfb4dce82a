"""One address of the fleet: its link, what the worker behind it said about itself, and what this router sent it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from kvstore.keys import KEY_BYTES
from kvstore.store.rates import TierRates
from kvstore.store.tier import Tier
from pdserve.protocol import worker_pb2 as pb
from router.backlog import Backlog
from router.columns import Columns, Seats
from router.events import EventCursor
from router.link import WorkerLink
from router.policy import Candidate, LinkFacts, Links, Role
from router.policy.fetches import FETCH_TIERS
from router.speed import SpeedLearner
from router.step_model import StepLearner
from router.store_watch import StoreLife

_ROLES: Mapping[int, Role] = {pb.PREFILL: Role.PREFILL, pb.DECODE: Role.DECODE, pb.MIXED: Role.MIXED}


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What all workers of a fleet have in common; the first one that joins an empty fleet sets it."""

    model: str
    fingerprint: bytes
    block_size: int  # tokens
    vocab_size: int
    max_model_len: int  # of the worker with the longest context
    eos_token_ids: tuple[int, ...]

    @classmethod
    def of(cls, hello: pb.WorkerHello) -> ModelFacts:
        return cls(
            model=hello.model,
            fingerprint=hello.fingerprint,
            block_size=hello.block_size,
            vocab_size=hello.vocab_size,
            max_model_len=hello.max_model_len,
            eos_token_ids=tuple(hello.eos_token_ids),
        )

    def difference(self, hello: pb.WorkerHello) -> str:
        """Why a worker cannot join, in clear text; empty when it can."""
        for what, ours, theirs in (
            ("model", self.model, hello.model),
            ("block_size", self.block_size, hello.block_size),
            ("vocab_size", self.vocab_size, hello.vocab_size),
            ("layout fingerprint (of weights, dtypes and layout)", self.fingerprint.hex(), hello.fingerprint.hex()),
        ):
            if ours != theirs:
                return f"{what} is {theirs}, the fleet has {ours}"
        return ""


def check_role(role: int) -> Role:
    """Raises ValueError for a role that no fleet knows."""
    if role not in _ROLES:
        raise ValueError(f"role {role} is unknown")
    return _ROLES[role]


def check_hello(hello: pb.WorkerHello) -> Role:
    """Raises ValueError for a worker that no fleet can use."""
    role = check_role(hello.role)
    if not (hello.block_size and hello.num_blocks and hello.max_model_len and hello.max_sequences and hello.vocab_size):
        raise ValueError("the worker's hello lacks a size")
    return role


@dataclass(slots=True, eq=False)
class Member:
    """Mutable; owned by the fleet. `slot` is its place in the prefix index."""

    slot: int
    columns: Columns  # of the fleet, where its load and speed are looked up
    link: WorkerLink
    listed_s: float  # last time that its address was listed
    hello: pb.WorkerHello = field(default_factory=pb.WorkerHello)
    role: Role = Role.MIXED
    next_role: Role | None = None  # while it drains to change its role: it takes nothing new
    joined_s: float = 0.0
    in_use: bool = False  # its session is up and nothing speaks against it
    incompatible: str = ""
    drained: bool = False  # an operator took it out of use: it gets nothing new
    load: pb.LoadReport = field(default_factory=pb.LoadReport)
    events: EventCursor = field(default_factory=EventCursor)
    links: dict[str, tuple[int, LinkFacts]] = field(default_factory=dict)  # by peer id: incarnation, facts
    link_errors: dict[str, str] = field(default_factory=dict)  # the last one, by peer id
    distrusted: set[int] = field(default_factory=set)  # incarnations of peers to which a hand-over failed lately
    told_peers: bytes = b""  # the last Peers message
    partners: int = 0
    seen_links: tuple[Seats, Links] | None = None  # `links` as columns, while they and the roster stay the same
    outstanding_tokens: int = 0  # uncached prompt tokens sent there and not yet answered by a token
    sequences: int = 0  # of this router, on it now
    learner: SpeedLearner = field(init=False)
    backlog: Backlog = field(default_factory=Backlog)  # of the prompts that this router sent
    planned_tokens: int = 0  # of requests that wait for it here, while the queue is looked through
    store: StoreLife | None = None  # the store node that it is attached to
    store_shares: bool = False
    store_node: int = -1  # its number in the store index
    tier_rates: TierRates = field(default_factory=TierRates)
    steps: StepLearner = field(default_factory=StepLearner)

    def __post_init__(self) -> None:
        self.columns.reset(self.slot)
        self.learner = SpeedLearner(lambda speed: self.columns.set_speed(self.slot, speed))

    @property
    def worker_id(self) -> str:
        return self.hello.worker_id

    @property
    def state(self) -> str:
        if self.incompatible:
            return "incompatible"
        if not self.link.up:
            return "unreachable"
        if self.link.suspect:
            return "suspect"
        if self.next_role is not None:
            return "draining"
        return "drained" if self.drained else "ready"

    @property
    def leaving(self) -> str:
        """Why it takes nothing new, in clear text; empty when it does."""
        if self.drained:
            return "drained by an operator"
        return f"drains to become a {self.next_role.value} worker" if self.next_role is not None else ""

    @property
    def takes_requests(self) -> bool:
        return self.in_use and not self.link.suspect and not self.leaving

    def change_role(self, report: pb.RoleReport) -> None:
        """Raises ValueError for a role that no fleet knows."""
        role, next_role = check_role(report.role), _ROLES.get(report.next_role)
        if role is not self.role:
            self.links.clear()  # those of the old role are closed without a word
            self.seen_links = None
        self.role, self.next_role = role, next_role

    def join(self, hello: pb.WorkerHello, role: Role, now_s: float) -> None:
        self.hello, self.role, self.joined_s, self.in_use = hello, role, now_s, True
        self.next_role = _ROLES.get(hello.next_role)
        self.incompatible = ""
        # Until its first report it is empty, as a worker without sequences is.
        self.note_load(pb.LoadReport(free_blocks=hello.num_blocks, total_blocks=hello.num_blocks), now_s)

    def leave(self) -> None:
        """The session ended: what it said holds no longer. What was sent to it stays remembered."""
        self.in_use = False
        self.store, self.store_shares = None, False
        self.events = EventCursor()
        self.links.clear()
        self.link_errors.clear()
        self.seen_links = None
        self.told_peers = b""
        self.partners = 0

    def accept_event(self, event: pb.KvEvents) -> bool:
        """Whether to apply it: not if it was applied before.

        Raises:
            ValueError: something was lost before it, or it is malformed; a new session brings a new snapshot.
        """
        if len(event.stored) > self.hello.num_blocks * KEY_BYTES:
            raise ValueError(f"a KV event stores more keys than the worker's {self.hello.num_blocks} blocks")
        return self.events.accept(event.sequence, snapshot=event.snapshot)

    def link_to(self, peer: Member) -> LinkFacts | None:
        """The data-plane link to the peer's present life; down while it is distrusted."""
        incarnation, facts = self.links.get(peer.worker_id, (None, None))
        if facts is None or incarnation != peer.hello.incarnation:
            return None
        return replace(facts, up=False, error="a hand-over failed") if incarnation in self.distrusted else facts

    def note_store(self, report: pb.StoreReport) -> None:
        self.store = StoreLife(report.address, report.incarnation) if report.address else None
        self.store_shares = report.shares

    def note_fetch(self, tiers: Sequence[Tier], elapsed_s: float) -> None:
        """Blocks came from these tiers of the store, in all this time."""
        if tiers and self.tier_rates.fetched(tiers, self.hello.block_bytes, elapsed_s):
            self.columns.set_byte_s(self.slot, [self.tier_rates.byte_s(tier) for tier in FETCH_TIERS])

    def note_load(self, load: pb.LoadReport, now_s: float) -> None:
        """A step without prompts in it says how long one with so many sequences takes. What other routers sent since
        the last report is remembered as what this one sends is."""
        prompts = load.waiting_tokens or self.load.waiting_tokens or self.backlog.tokens
        if self.role is Role.DECODE or not prompts:
            self.steps.note(load.running_sequences, load.context_tokens, load.step_s)
        sent_tokens = load.others_sent_tokens - self.load.others_sent_tokens
        if sent_tokens > 0:
            self.columns.add_recent(self.slot, sent_tokens, now_s)
        self.load = load
        self._refresh()

    def take(self, uncached_tokens: int) -> None:
        """A request was sent there; each `take` is followed by one `give_back`."""
        self.outstanding_tokens += uncached_tokens
        self.sequences += 1
        self._refresh()

    def computed(self, tokens: int) -> None:
        """So many of the tokens that it took wait no longer."""
        self.outstanding_tokens -= tokens
        self._refresh()

    def give_back(self) -> None:
        self.sequences -= 1
        self._refresh()

    def plan(self, tokens: int) -> None:
        self.planned_tokens += tokens
        self._refresh()

    @property
    def busy_sequences(self) -> int:
        """The larger of what it reported and what routers sent: this one, and the others as of the last report."""
        load = self.load
        reported = load.running_sequences + load.waiting_sequences + load.pending_reservations
        return max(reported, self.sequences + load.others_sequences)

    def backlog_s(self, now_s: float) -> float:
        """Until its prompts are computed: those of this router, planned ones included, and what it reported beyond."""
        foreign = max(self.load.others_waiting_tokens, self.load.waiting_tokens - self.backlog.tokens)
        more = foreign + self.planned_tokens
        tokens = self.backlog.tokens + more
        if not tokens:
            return 0.0
        return self.backlog.seconds(now_s, tokens / self.learner.speed.prefill_s(tokens), more)

    def _refresh(self) -> None:
        """The larger of what it reported and what routers have on its way: this one, and the others as it reported."""
        load = self.load
        sent_tokens = self.outstanding_tokens + load.others_waiting_tokens
        self.columns.set_figures(
            self.slot,
            waiting_tokens=max(load.waiting_tokens, sent_tokens) + self.planned_tokens,
            sequences=self.busy_sequences,
            context_tokens=load.context_tokens,
            free_blocks=load.free_blocks,
        )

    def candidate(self) -> Candidate:
        """What seldom changes about it."""
        return Candidate(
            worker_id=self.worker_id,
            role=self.role,
            alive=self.in_use and not self.link.suspect,
            leaving=self.leaving,
            incompatible=self.incompatible,
            max_model_len=self.hello.max_model_len,
            max_sequences=self.hello.max_sequences,
            total_blocks=self.hello.num_blocks,
            block_bytes=self.hello.block_bytes,
            has_store=self.hello.has_store,
            store_node=self.store_node,
            store_shares=self.store_shares,
            partners=self.partners,
        )

    def as_peer(self) -> pb.Peer:
        hello = self.hello
        return pb.Peer(
            worker_id=hello.worker_id,
            incarnation=hello.incarnation,
            address=hello.address or self.link.address,
            host_id=hello.host_id,
        )

    def describe(self) -> dict[str, Any]:
        """For people and machines: JSON-ready."""
        return {
            "worker_id": self.worker_id,
            "address": self.link.address,
            "admin_address": self.hello.admin_address,
            "state": self.state,
            "role": self.role.value if self.worker_id else None,
            "next_role": self.next_role.value if self.next_role is not None else None,
            "error": self.incompatible or ("" if self.link.up else self.link.last_error),
            "free_blocks": self.load.free_blocks,
            "total_blocks": self.load.total_blocks,
            "running_sequences": self.load.running_sequences,
            "waiting_tokens": self.load.waiting_tokens,
            "links": [
                {
                    "to": peer,
                    "up": facts.up,
                    "transport": facts.transport,
                    "bytes_per_second": facts.bytes_per_s,
                    "error": facts.error,
                }
                for peer, (_, facts) in sorted(self.links.items())
            ],
        }
