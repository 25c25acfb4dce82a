"""Which prefill worker may hand over to which decode worker: by the links that it reports, less what failed lately."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping

from pdserve.protocol import worker_pb2 as pb
from router.limits import FleetLimits
from router.member import Member
from router.policy import LinkFacts, Role

log = logging.getLogger(__name__)

_FAILED = "a hand-over failed"


class Pairing:
    """Use in the event loop only."""

    def __init__(self, members: Mapping[str, Member], limits: FleetLimits, changed: Callable[[], None]) -> None:
        """`members` are those in use, by worker id; `changed` is told when `Member.partners` may have."""
        self._members = members
        self._limits = limits
        self._changed = changed

    def note(self, member: Member, report: pb.LinkReport) -> None:
        """A report may come before its peer does, so unknown peers are kept; one on another life counts for nothing.

        Raises:
            ValueError: there cannot be so many peers.
        """
        if report.peer_id not in member.links and len(member.links) >= self._limits.workers:
            raise ValueError("the worker reports more links than a fleet has workers")
        facts = LinkFacts(report.up, report.transport, report.bytes_per_second, report.error)
        before = member.links.get(report.peer_id)
        member.links[report.peer_id] = (report.peer_incarnation, facts)
        member.seen_links = None
        if report.error:
            member.link_errors[report.peer_id] = report.error
        if before is None or before[1].up != facts.up:
            log.info("link from=%s to=%s %s", member.worker_id, report.peer_id, facts)
        self._changed()

    def distrust(self, prompt_id: str, decode_id: str) -> None:
        """A hand-over between the two failed, whatever their link says: give them none for a while."""
        prompt, decode = self._members.get(prompt_id), self._members.get(decode_id)
        if prompt is None or decode is None:
            return  # one of them is gone, which explains it
        life = decode.hello.incarnation
        prompt.distrusted.add(life)
        prompt.link_errors[decode_id] = _FAILED
        prompt.seen_links = None
        self._changed()
        asyncio.get_running_loop().call_later(self._limits.distrust_s, self._trust, prompt, life)

    def _trust(self, prompt: Member, life: int) -> None:
        prompt.distrusted.discard(life)
        prompt.seen_links = None
        self._changed()

    def role_changed(self, worker_id: str) -> None:
        """What its peers last said of it was of a link that is closed now."""
        for other in self._members.values():
            other.links.pop(worker_id, None)
            other.seen_links = None

    def tell_peers(self) -> None:
        """Each prefill worker which decode workers there are; a peer that vanished is left out."""
        decoders = [each for _, each in sorted(self._members.items()) if each.role is Role.DECODE]
        peers = pb.Peers(peers=[each.as_peer() for each in decoders])
        for member in self._members.values():
            wanted = peers if member.role is Role.PREFILL else pb.Peers()
            encoded = wanted.SerializeToString(deterministic=True)
            if member.told_peers != encoded:
                member.told_peers = encoded
                member.link.send(pb.RouterMessage(peers=wanted))

    def count_partners(self) -> None:
        decoders = [each for each in self._members.values() if each.role is Role.DECODE and not each.leaving]
        for member in self._members.values():
            links = (member.link_to(decoder) for decoder in decoders)
            member.partners = sum(1 for facts in links if facts is not None and facts.up)
