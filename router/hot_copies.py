"""Hot prefixes at work: what was placed is counted, and a worker is asked to load what the store has of a hot one."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

from kvstore.keys import BlockKey
from pdserve.protocol import worker_pb2 as pb
from router.fleet import Fleet
from router.hot_prefixes import Copy, HotPrefixes, Target
from router.member import Member
from router.policy import Decision, Need, Role
from router.policy.scorers import SEQUENCE_TOKENS

log = logging.getLogger(__name__)


class HotCopies:
    def __init__(self, fleet: Fleet, budget_bytes: int, window_s: float) -> None:
        self.prefixes = HotPrefixes(budget_bytes, window_s)
        self._fleet = fleet

    def placed(self, decision: Decision, need: Need, keys: Sequence[BlockKey]) -> Copy | None:
        """A prompt was placed; the copy that this led to."""
        chosen = decision.chosen
        if chosen is None or not len(self._fleet.stores.index):
            return None  # there is nothing that a copy could come from
        member = self._fleet.member(chosen.worker_id)
        assert member is not None
        # What it takes of a worker that has what some worker has: whoever was chosen instead computes more.
        tokens = max(1, need.tokens - need.block_size * decision.best_hit_blocks)
        tokens += SEQUENCE_TOKENS if member.role is not Role.PREFILL else 0
        now_s = time.monotonic()
        hot = self.prefixes.note(keys, member.learner.speed.prefill_s(tokens), now_s)
        if not hot:
            return None
        # What decode workers hold of it, each that ever took over such a request, serves no prompt.
        servers = [each for each in self._fleet.in_use() if each.role is not Role.DECODE] or self._fleet.in_use()
        match = self._fleet.index.match(keys)
        held = {each.slot: blocks for each in servers if (blocks := match.of(each.slot))}
        copy = self.prefixes.choose(hot, held, self._targets(servers, keys, now_s), member.hello.block_bytes, now_s)
        if copy is not None:
            log.info("prefix of %d blocks is hot (load %.2f): %s loads it", copy.blocks, copy.load, copy.worker_id)
            message = pb.Prefetch(keys=b"".join(keys[: copy.blocks]))
            self._fleet.send(copy.worker_id, pb.RouterMessage(prefetch=message))
        return copy

    def _targets(self, servers: Sequence[Member], keys: Sequence[BlockKey], now_s: float) -> list[Target]:
        """Those whose store has something of them."""
        stored = self._fleet.stores.index.match(keys)
        if stored is None:
            return []
        return [
            Target(
                each.worker_id,
                each.slot,
                max(stored.on(each.store_node), stored.most * each.store_shares),
                each.backlog_s(now_s),
            )
            for each in servers
        ]
