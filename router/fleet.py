"""The fleet: the workers that are known, joined from discovery (addresses) and sessions (truth).

Discovery only adds addresses. A worker counts while its session lives, listed or not; an address that is neither listed
nor connected is forgotten after `forget_s`. All methods run in the event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter
from dataclasses import replace
from functools import lru_cache
from typing import Any, Protocol

from kvstore.background import keep_running
from kvstore.control_plane import IN_THE_CLEAR, ControlPlane
from kvstore.keys import BlockKey, root_key
from pdserve.discovery import Discovery
from pdserve.errors import Overloaded
from pdserve.protocol import worker_pb2 as pb
from router.columns import Columns, Seats
from router.index import Match, PrefixIndex, split_keys
from router.limits import FleetLimits
from router.link import WorkerLink
from router.member import Member, ModelFacts, check_hello
from router.pairing import Pairing
from router.policy import Candidates, Links, Role
from router.readiness import Readiness
from router.store_index import Stored
from router.store_watch import StoreWatch

log = logging.getLogger(__name__)

_root_key = lru_cache(maxsize=1024)(root_key)  # one for each tenant and narrower salt, asked by every request


class RequestListener(Protocol):
    """What the fleet passes on because it concerns requests."""

    def on_message(self, worker_id: str, message: pb.WorkerMessage) -> None:
        """A step, handoff_wanted, reserved or refused."""
        ...

    def on_worker_lost(self, worker_id: str, reason: str) -> None:
        """Nothing more comes from this life of the worker, and it aborts what it was doing."""
        ...


class Fleet:
    def __init__(
        self,
        discovery: Discovery,
        router_id: str,
        limits: FleetLimits,
        vocab_size: int | None = None,
        control: ControlPlane = IN_THE_CLEAR,
        expected_roles: frozenset[Role] = frozenset(),
    ) -> None:
        """`vocab_size` is that of the router's own model; a worker with another one is refused."""
        self.index = PrefixIndex()
        self.columns = Columns()
        self.stores = StoreWatch(limits.link, control)
        self._readiness = Readiness(expected_roles, limits)
        self._discovery = discovery
        self._router_id = router_id
        self._limits = limits
        self._vocab_size = vocab_size
        self._control = control
        self._members: dict[str, Member] = {}  # by address
        self._by_id: dict[str, Member] = {}  # those in use
        self._by_link: dict[WorkerLink, Member] = {}
        self.pairing = Pairing(self._by_id, limits, self.note_roster)
        self._listing = True  # discovery answered last time
        self._seats: Seats | None = None  # all workers that ever said hello; None: something about them changed
        self._facts: ModelFacts | None = None
        self._facts_now: ModelFacts | None = None  # with the longest context of those in use; None: one came or went
        self._listener: RequestListener | None = None
        self.role_changes: Counter[tuple[str, str]] = Counter()  # from, to
        self._drained: dict[str, None] = {}  # workers that an operator took out of use, oldest first
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    # --- life ---

    def start(self, listener: RequestListener) -> None:
        self._listener = listener
        self._task = keep_running(self._discover, "fleet discovery")

    async def close(self) -> None:
        """End all sessions, which aborts their requests on the workers."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await asyncio.gather(*(self._drop(member) for member in list(self._members.values())))
        await self.stores.close()
        await self._discovery.close()

    async def _discover(self) -> None:
        while True:
            listed = await self._discovery.poll()
            self._listing = listed is not None
            now_s = time.monotonic()
            if listed is not None:
                for endpoint in listed:
                    self._note_listed(endpoint.address, now_s)
                for member in [each for each in self._members.values() if self._forgotten(each, now_s)]:
                    log.info("worker address=%s forgotten: neither listed nor connected", member.link.address)
                    await self._drop(member)
            await asyncio.sleep(self._limits.poll_s)

    def _note_listed(self, address: str, now_s: float) -> None:
        member = self._members.get(address)
        if member is not None:
            member.listed_s = now_s
        elif len(self._members) < self._limits.workers:
            link = WorkerLink(address, self._router_id, self, self._limits.link, self._control)
            used = {each.slot for each in self._members.values()}
            slot = next(number for number in range(self._limits.workers) if number not in used)
            self._members[address] = self._by_link[link] = Member(slot, self.columns, link, now_s)
            link.start()

    def _forgotten(self, member: Member, now_s: float) -> bool:
        return not member.link.up and now_s - member.listed_s > self._limits.forget_s

    async def _drop(self, member: Member) -> None:
        self._members.pop(member.link.address, None)
        self._seats = None
        await member.link.close()
        self._by_link.pop(member.link, None)

    # --- sessions: router.link.LinkListener ---

    def link_up(self, link: WorkerLink, hello: pb.WorkerHello) -> None:
        member = self._by_link[link]
        role = check_hello(hello)
        member.join(hello, role, time.monotonic())
        member.drained = hello.worker_id in self._drained
        member.incompatible = self._reason_to_refuse(hello)
        self._seats = None
        if member.incompatible:
            member.in_use = False
            log.error("worker=%s address=%s refused: %s", hello.worker_id, link.address, member.incompatible)
            return
        if not self._by_id:
            self._facts = ModelFacts.of(hello)
        self._by_id[hello.worker_id] = member
        for other in self._members.values():
            if other is not member and other.worker_id == hello.worker_id and not other.link.up:
                other.hello = pb.WorkerHello()  # an earlier life of it, at an address that it has left
        log.info("worker=%s role=%s address=%s joined", hello.worker_id, role.value, link.address)
        self._membership_changed()

    def _reason_to_refuse(self, hello: pb.WorkerHello) -> str:
        if hello.worker_id in self._by_id:
            return f"worker_id {hello.worker_id} is already connected at {self._by_id[hello.worker_id].link.address}"
        if self._vocab_size not in (None, hello.vocab_size):
            return f"vocab_size is {hello.vocab_size}, the model of this router has {self._vocab_size}"
        return self._facts.difference(hello) if self._facts is not None and self._by_id else ""

    def link_message(self, link: WorkerLink, message: pb.WorkerMessage) -> None:
        member = self._by_link[link]
        if not member.in_use:
            return
        match message.WhichOneof("body"):
            case "load":
                member.note_load(message.load, time.monotonic())
                if member.role is Role.DECODE:  # elsewhere a step holds prompts too
                    member.learner.note_step(message.load.running_sequences, message.load.step_s)
                self._wake()
            case "kv_events":
                self._apply(member, message.kv_events)
            case "link":
                self.pairing.note(member, message.link)
            case "store":
                member.note_store(message.store)
                self._follow_stores()
            case "role":
                self._note_role(member, message.role)
            case "hello" | None:
                raise ValueError("a message that belongs nowhere")
            case _:
                if self._listener is not None:
                    self._listener.on_message(member.worker_id, message)

    def _apply(self, member: Member, event: pb.KvEvents) -> None:
        if not member.accept_event(event):
            return
        stored = split_keys(event.stored)
        if event.snapshot:
            self.index.snapshot(member.slot, stored)
            return
        self.index.removed(member.slot, split_keys(event.removed))
        self.index.stored(member.slot, stored)
        if self.index.count(member.slot) > member.hello.num_blocks:
            raise ValueError(f"the worker says that it holds more than its {member.hello.num_blocks} blocks")

    def _note_role(self, member: Member, report: pb.RoleReport) -> None:
        """It begins to drain, or has the new role. Its peers hear of it: links run from prefill to decode."""
        before = member.role
        member.change_role(report)
        log.info("worker=%s role=%s next_role=%s", member.worker_id, member.role.value, member.next_role)
        if member.role is not before:
            self.role_changes[before.value, member.role.value] += 1
            self.pairing.role_changed(member.worker_id)
        self._membership_changed()

    def _follow_stores(self) -> None:
        """The store nodes that workers are attached to; one that has no worker any more serves nobody here."""
        self.stores.watch(each.store for each in self._by_id.values() if each.store is not None)
        for member in self._by_id.values():
            member.store_node = self.stores.node(member.store)
        self._seats = None

    def link_silent(self, link: WorkerLink) -> None:
        member = self._by_link[link]
        self._seats = None
        log.warning("worker=%s %s", member.worker_id, "is silent" if link.suspect else "is heard from again")
        self._wake()

    def link_down(self, link: WorkerLink, reason: str) -> None:
        member = self._by_link[link]
        was_in_use = member.in_use
        member.leave()
        self._seats = None
        self.index.remove_worker(member.slot)
        if not was_in_use:
            return
        del self._by_id[member.worker_id]
        self._follow_stores()
        if reason:
            log.warning("worker=%s address=%s lost: %s", member.worker_id, link.address, reason)
        self._membership_changed()
        for other in self._members.values():
            if other.incompatible:  # perhaps only beside the one that is gone
                other.link.renew("to be judged again")
        if self._listener is not None:
            self._listener.on_worker_lost(member.worker_id, reason)

    def _membership_changed(self) -> None:
        self.pairing.tell_peers()
        self._facts_now = None
        self.note_roster()

    # --- for the dispatcher ---

    def candidates(
        self, match: Match, now_s: float, *, linked_from: str | None = None, stored: Stored | None = None
    ) -> Candidates:
        """All workers that ever said hello. `match` and `stored` are of the indexes, for the request in question."""
        if self._seats is None:
            members = (member for member in self._members.values() if member.worker_id)
            self._seats = Seats.of([(member.slot, member.candidate()) for member in members])
        links = self._links_from(linked_from, self._seats) if linked_from is not None else None
        return self.columns.candidates(self._seats, match, now_s, links, stored)

    def _links_from(self, worker_id: str, seats: Seats) -> Links | None:
        source = self._by_id.get(worker_id)
        if source is None:
            return None
        if source.seen_links is None or source.seen_links[0] is not seats:
            by_slot = {member.slot: source.link_to(member) for member in self._members.values()}
            source.seen_links = seats, Links.of([by_slot[slot] for slot in seats.slots.tolist()])
        return source.seen_links[1]

    def member(self, worker_id: str) -> Member | None:
        """The worker, while its session is up."""
        return self._by_id.get(worker_id)

    @property
    def decodes_from_store(self) -> bool:
        """Some decode worker reads blocks from a store."""
        return any(each.role is Role.DECODE and each.hello.has_store for each in self._by_id.values())

    def send(self, worker_id: str, message: pb.RouterMessage) -> bool:
        """False when the worker is gone; its loss is, or will be, told through the listener."""
        member = self._by_id.get(worker_id)
        return member is not None and member.link.send(message)

    def in_use(self) -> list[Member]:
        """Those that can be sent something new."""
        return [member for member in self._by_id.values() if member.takes_requests]

    def drain(self, worker_id: str, drained: bool) -> bool:
        """Give it nothing new, or use it again; False if no worker has this id.

        That is said of the worker, not of one life or address of it: it holds over restarts, on whatever port. Of more
        ids than a fleet has workers the oldest goes, for what is never undone must not grow.
        """
        found = [member for member in self._members.values() if member.worker_id == worker_id]
        if not found and (drained or worker_id not in self._drained):
            return False
        self._drained.pop(worker_id, None)
        if drained:
            self._drained[worker_id] = None
            if len(self._drained) > self._limits.workers:
                self._drained.pop(next(iter(self._drained)))
        for member in found:
            member.drained = drained
        log.warning("worker=%s drained=%s", worker_id, drained)
        self.note_roster()
        return True

    def note_roster(self) -> None:
        """A worker came, went, was drained or is in use again, or a link changed."""
        self._seats = None
        self.pairing.count_partners()
        self._wake()

    def note_room(self) -> None:
        """The dispatcher knows, before the worker reports it, that somewhere is room again."""
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def wait_change(self, timeout_s: float) -> None:
        """Until a worker, a link or a load changes, at most `timeout_s`."""
        changed = self._changed
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await changed.wait()

    # --- for the HTTP layer ---

    def facts(self) -> ModelFacts:
        """Those of the last fleet while all its workers are gone. Raises Overloaded before any worker connected."""
        if self._facts is None:
            raise Overloaded("No worker is connected yet; /readyz says what is waited for.")
        if self._facts_now is None:
            contexts = [member.hello.max_model_len for member in self._by_id.values()]
            longest = max(contexts, default=self._facts.max_model_len)
            self._facts_now = replace(self._facts, max_model_len=longest)
        return self._facts_now

    def root_key(self, salt: bytes) -> BlockKey:
        """What the first blocks of all requests chain from. Raises Overloaded before any worker connected."""
        return _root_key(self.facts().fingerprint, salt)

    @property
    def ready(self) -> bool:
        return not self.why_not_ready

    @property
    def why_not_ready(self) -> str:
        """In clear text; empty when a request would be served as it should be."""
        why_not = self._readiness.why_not(self.in_use(), time.monotonic())
        return why_not if self._listing or not why_not else f"{why_not}; Redis, which would name them, does not answer"

    def counts(self) -> Counter[tuple[str, str]]:
        """Workers by (role, state); the role of one that never said hello is "unknown"."""
        return Counter(
            (member.role.value if member.worker_id else "unknown", member.state) for member in self._members.values()
        )

    def named(self, worker_id: str) -> Member | None:
        """The one that has a session or, of those that said hello and have none now, any."""
        gone = (each for each in self._members.values() if each.worker_id == worker_id)
        return self._by_id.get(worker_id) or next(gone, None)

    def known(self) -> list[Member]:
        """All that ever said hello, by name."""
        return sorted((each for each in self._members.values() if each.worker_id), key=lambda each: each.worker_id)

    def topology(self) -> dict[str, Any]:
        """JSON-ready: every known address with its state, and the links between workers."""
        members = sorted(self._members.values(), key=lambda member: (member.worker_id, member.link.address))
        why_not = self.why_not_ready
        return {
            "ready": not why_not,
            "reason": why_not,
            "model": self._facts.model if self._facts is not None else None,
            "workers": [member.describe() for member in members],
        }
